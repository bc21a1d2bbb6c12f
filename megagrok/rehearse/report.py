"""A rehearsal as a page of text, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from megagrok.rehearse.against_plan import Row
from megagrok.rehearse.rehearsal import Memory, Rehearsal

_MOMENTS = {
    "build": "after the build",
    "forward_backward": "forward and backward",
    "reduce": "reduction",
    "step": "AdamW",
}


def to_text(name: str, found: Rehearsal, rows: Sequence[Row]) -> str:
    """Memory, collectives, FLOPs, shapes, what was replaced; then the plan beside it."""
    head = (
        f"{name}: rank {found.rank} of {found.world_size}, pipeline stage {found.stage}. "
        f"Walked {found.micro_batches} of the step's {found.micro_batches_of_step} micro-batches in "
        f"{found.seconds:.0f} s; figures of one micro-batch come {found.micro_batches_of_step} times a step."
    )
    sections = [
        ("GiB allocated at the peak of", _memory(found)),
        ("collectives of one micro-batch (once: of one step; start: when the engine is built)", _traffic(found)),
        ("FLOPs of one micro-batch", _flops(found)),
        ("shapes in one layer", _shapes(found)),
        ("not as in the run", [f"  {sentence}" for sentence in found.replaced]),
        ("counted here, and what megagrok.plan says", _rows(rows)),
    ]
    return "\n\n".join([head, *("\n".join([title, *lines]) for title, lines in sections)])


def to_json(name: str, found: Rehearsal, rows: Sequence[Row]) -> str:
    """Everything, bytes and FLOPs as they are."""
    plan = [asdict(row) | {"holds": row.holds} for row in rows]
    return json.dumps({"name": name, **asdict(found), "plan": plan}, indent=2)


def _memory(found: Rehearsal) -> list[str]:
    moments = {"build": found.build, "forward_backward": found.forward_backward, "reduce": found.reduce}
    moments["step"] = found.step
    names = [part.name for part in fields(Memory)]
    lines = ["  " + " " * 21 + "".join(f"{name:>14}" for name in (*names, "all"))]
    for moment, memory in moments.items():
        sizes = asdict(memory) | {"all": memory.total}
        lines.append(f"  {_MOMENTS[moment]:<21}" + "".join(f"{size / 2**30:>14.3f}" for size in sizes.values()))
    return lines


def _traffic(found: Rehearsal) -> list[str]:
    lines = [f"  {'group':<15}{'kind':<16}{'when':<10}{'calls':>8}{'MiB':>14}"]
    for part in found.traffic:
        lines.append(f"  {part.group:<15}{part.op:<16}{part.direction:<10}{part.calls:>8g}{part.size / 2**20:>14,.3f}")
    return lines if found.traffic else ["  none: every group has one rank"]


def _flops(found: Rehearsal) -> list[str]:
    return [f"  {part.direction:<10} {part.op:<16} {part.count:>12.4e}" for part in found.flops]


def _shapes(found: Rehearsal) -> list[str]:
    return [
        f"  {shape.module:<32} -> {'x'.join(map(str, shape.output)):<20} "
        + ", ".join("x".join(map(str, weight)) for weight in shape.weights)
        for shape in found.shapes
    ]


def _rows(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["  nothing: the plan's FLOPs and messages are those of balanced routing"]
    lines = [f"  {'':<28}{'counted':>14}{'planned':>14}{'plan is off by':>16}"]
    for row in rows:
        verdict = f"  OVER its bound of {row.bound:.0%}" * (not row.holds)
        lines.append(f"  {row.name:<28}{row.counted:>14.5g}{row.planned:>14.5g}{row.deviation:>+16.2%}{verdict}")
    return lines
