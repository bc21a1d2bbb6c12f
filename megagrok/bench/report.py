"""What `megagrok bench` prints, and the JSON and the page that it leaves."""

import json
from dataclasses import asdict
from pathlib import Path

from megagrok.bench.ledger import ROWS
from megagrok.bench.measure import Ledger, Measured, Request
from megagrok.plan.flops import CONVENTION

_MEANING = {
    "matmul": "linear layers, experts and output head, forward and backward",
    "attention": "scores and weighted values",
    "memory_bound": "norms, activation functions, softmax, casts, copies, permutations, cross-entropy",
    "recompute": "kernels run again in the backward pass",
    "launch": "the device waits for the host; empty on a CPU, where they are one",
    "tensor": "communication over tensor ranks, once all are there",
    "context": "over context ranks",
    "expert": "over expert ranks: dispatch and combine",
    "pipeline": "between stages",
    "data": "over data ranks, and the totals of a step over all",
    "imbalance": "waiting for the slowest rank of a group: experts with more tokens, or a rank that is slow",
    "bubble": "a stage without a micro-batch",
    "optimizer": "gradients made whole, clipped, applied; without their communication",
    "loading": "making the next batch",
    "checkpoint": "what a save holds the step, shared among the steps between two; outside the steps measured here",
    "host": "between the kernels: Python, autograd, views, allocation",
}

_PAGE = """\
# Where a training step goes

`megagrok bench`, {steps} timed and {steps} recorded steps in turns after {warmup} to warm up, {data} data, {routing}
routing. Median, and (lowest to highest).

{speed}

MFU: {convention}.

## The loss ledger

{ledger}

Every instant of a rank's step belongs to one row: to the innermost operation of that moment, or to the collective that
the rank stands in. There, the time until the last rank has come is a wait (`imbalance`, or `bubble` if that rank is on
another stage), the rest is the transfer. The numbers are the mean over the ranks.

| | |
|---|---|
{facts}

## Again

```
{command}
```
"""


def to_text(measured: Measured) -> str:
    """For a terminal."""
    lines = [f"{name:<22} {value}" for name, value in _speed(measured)]
    if measured.ledger is not None:
        lines += ["", *_rows(measured.ledger), "", *_sums(measured.ledger)]
    return "\n".join(lines)


def write(measured: Measured, request: Request, facts: dict[str, object], command: str, path: Path) -> None:
    """FILE as JSON, and a page beside it (.md)."""
    record = {
        "command": command,
        "request": {"steps": request.steps, "warmup": request.warmup, "routing": request.routing, "data": request.data},
        **facts,
        "measured": {**asdict(measured), "mfu_of_matmul": measured.mfu(measured.matmul_flops.median)},
    }
    if measured.ledger is not None:
        record["adds_up"] = {"difference": measured.ledger.difference, "overhead": measured.ledger.overhead}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(measured, request, facts, command), encoding="utf-8")


def _page(measured: Measured, request: Request, facts: dict[str, object], command: str) -> str:
    ledger = "Not measured on a GPU: its kernels run behind the host that is recorded here."
    if measured.ledger is not None:
        table = ["| | ms | of the step | |", "|---|---|---|---|"]
        table += [
            f"| {row} | {seconds * 1e3:.1f} | {_share(row, seconds, measured.ledger)} | {_MEANING[row]} |"
            for row, seconds in measured.ledger.rows.items()
        ]
        ledger = "\n".join([*table, "", *(f"{line}  " for line in _sums(measured.ledger))])
    return _PAGE.format(
        steps=request.steps,
        warmup=request.warmup,
        data=request.data,
        routing=request.routing,
        speed="\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _speed(measured))]),
        convention=CONVENTION,
        ledger=ledger,
        facts="\n".join(f"| {name} | {_flat(value)} |" for name, value in facts.items()),
        command=command,
    )


def _speed(measured: Measured) -> list[tuple[str, str]]:
    peak = measured.matmul_flops
    lines = [
        ("step", f"{measured.step_seconds.in_words('{:.4f}')} s"),
        ("tokens/s", measured.tokens_per_second.in_words()),
        ("plain matmuls", f"{_giga(peak.median)} ({_giga(peak.min)} to {_giga(peak.max)}), all ranks at the same time"),
        ("MFU, measured peak", f"{measured.mfu(peak.median):.1%}; HFU {measured.hfu(peak.median):.1%}"),
    ]
    if measured.datasheet_flops is None:
        lines.append(("MFU, data sheet", "a CPU has no such peak"))
    else:
        sheet = measured.datasheet_flops
        lines.append(("MFU, data sheet", f"{measured.mfu(sheet):.1%}; HFU {measured.hfu(sheet):.1%}"))
    return lines


def _rows(ledger: Ledger) -> list[str]:
    return [
        f"{row:<14} {ledger.rows[row] * 1e3:9.2f} ms  {_share(row, ledger.rows[row], ledger):>7}  {_MEANING[row]}"
        for row in ROWS
    ]


def _share(row: str, seconds: float, ledger: Ledger) -> str:
    return "beside it" if row == "checkpoint" else f"{seconds / ledger.total:.1%}"


def _sums(ledger: Ledger) -> list[str]:
    return [
        f"the rows add up to {ledger.total * 1e3:.1f} ms; the step that nothing observed takes "
        f"{ledger.timed * 1e3:.1f} ms: {ledger.difference:+.1%}; step by step {ledger.pairs.median - 1:+.1%} "
        f"({ledger.pairs.min - 1:+.1%} to {ledger.pairs.max - 1:+.1%})",
        f"recorded, the same step took {ledger.recorded * 1e3:.1f} ms ({ledger.overhead:+.1%}): {ledger.events:,} "
        f"operations on a rank, {ledger.event_seconds * 1e6:.2f} µs of CPU time each, which is taken out",
    ]


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP/s"


def _flat(value: object) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
