"""What `megagrok plan` prints: the best layouts, why the first wins, its memory, its price. Computes none of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megagrok.errors import ConfigError
from megagrok.plan.calibration import Calibration
from megagrok.plan.constants import PUE, SERVER_FACTOR
from megagrok.plan.estimate import Estimate, StageBytes, StepSeconds
from megagrok.plan.flops import CONVENTION
from megagrok.plan.measured import UNKNOWN_BYTES
from megagrok.plan.params import total_params
from megagrok.plan.price import Bill
from megagrok.plan.proposal import MODEL_FILE_TOKENS, Proposal
from megagrok.plan.run_file import run_file, write_run_file
from megagrok.plan.search import Candidate
from megagrok.plan.shape import Layout

GIB = 2**30
SECONDS_PER_DAY = 86_400
MOST_PARTS = 3
"""Parts of a step that a sentence names."""
LEAST_SHARE = 0.05
"""Per cent of the step: a layout that is slower by less is as fast."""
LEAST_PART = 0.001
"""Of the step: smaller differences are not worth a word."""
WORDS = {
    "tensor": "exposed TP communication",
    "context": "exposed CP communication",
    "expert": "exposed EP communication",
    "pipeline": "exposed PP communication",
    "data": "exposed DP communication",
    "memory_bound": "memory-bound work",
    "launch": "waiting for launches",
    "imbalance": "waiting for the fullest",
}
"""For the fields of StepSeconds that do not speak for themselves."""
TABLE_HEAD = (
    "", "TP", "SP", "PP", "VPP", "EP", "CP", "DP", "ZeRO", "micro", "recompute", "prec.",
    "peak GiB", "free GiB", "step s", "tokens/day", "MFU %", "HFU %",
)  # fmt: skip


def to_text(proposal: Proposal) -> str:
    """Everything, for a terminal."""
    blocks = ["\n".join(_heading(proposal)), *_answer(proposal)]
    if proposal.calibration is not None:
        blocks.append(_calibrated(proposal.calibration))
    return "\n\n".join(blocks)


def to_dict(proposal: Proposal) -> dict[str, Any]:
    """The numbers, plain, for JSON. Bytes and seconds."""
    found, gpu = proposal.found, proposal.machine.gpu
    return {
        "config": str(proposal.request.config),
        "gpus": proposal.request.gpus,
        "machine": asdict(proposal.machine),
        "tokens_per_step": proposal.run.train.global_batch * proposal.run.train.seq_len,
        "convention": CONVENTION,
        "peak_flops": {precision: gpu.peak(precision) for precision in proposal.precisions},
        "layouts": {
            "legal": found.legal,
            "fitting": found.fitting,
            "too_large": found.too_large,
            "larger_still": found.larger_still,
        },
        "best": [_candidate_dict(candidate) for candidate in found.best],
        "own": None if proposal.own is None else _candidate_dict(proposal.own),
        "nearest": None if found.nearest is None else _candidate_dict(found.nearest),
        "enough_gpus": proposal.enough_gpus,
        "larger_gpus": list(proposal.larger_gpus),
        "bill": None if proposal.bill is None else asdict(proposal.bill),
        "calibration": None if proposal.calibration is None else asdict(proposal.calibration),
    }


def layout_words(layout: Layout) -> str:
    """A layout in one line, the words of the table's head; what is 1 is left out."""
    sizes = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "VPP": layout.virtual_pipeline,
        "EP": layout.expert,
        "CP": layout.context,
        "DP": layout.data,
    }
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    if layout.sequence:
        parts.insert(1, "SP")
    parts += [f"ZeRO {layout.zero}", f"micro-batch {layout.micro_batch}", layout.precision]
    if layout.recompute != "none":
        parts.append(f"{layout.recompute} recompute")
    return ", ".join(parts)


def write_best(path: Path, proposal: Proposal) -> None:
    """Write the run file of the best layout.  Raises ConfigError if there is none, or nothing that it could train."""
    if proposal.is_model_file:
        raise ConfigError(
            f"--write {path}: {proposal.request.config} is a model; data, learning rate and steps are not the "
            "planner's to choose. Fix: plan a run file, such as configs/run/pretrain-286b.yaml."
        )
    if proposal.found.best:
        best = proposal.found.best[0]
        write_run_file(path, proposal.request.config, best.run, run_file_comment(proposal, best))


def run_file_comment(proposal: Proposal, candidate: Candidate) -> str:
    """What the head of a written file says."""
    price = candidate.estimate
    return (
        f"Written by `megagrok plan` for {proposal.request.gpus} {proposal.machine.gpu.name}: predicted "
        f"{price.seconds.total:.2f} s a step,\n{100 * price.mfu:.1f} % MFU, {price.peak_bytes / GIB:.1f} GiB on the "
        "fullest rank. A prediction, not a measurement."
    )


def _heading(proposal: Proposal) -> Iterator[str]:
    run, request, machine, found = proposal.run, proposal.request, proposal.machine, proposal.found
    train, gpu = run.train, machine.gpu
    yield (
        f"{run.name}: {_count(total_params(run.model))} parameters on {request.gpus:,} {gpu.name} in nodes of "
        f"{machine.gpus_per_node}, {machine.network_bandwidth / 1e9:g} GB/s of network per GPU"
    )
    why = ""
    if proposal.is_model_file:
        why = f" (a model file has no batch: {MODEL_FILE_TOKENS:,} tokens are taken)"
    elif request.seq_len is not None:
        why = " (tokens per step kept)"
    yield (
        f"{train.global_batch * train.seq_len:,} tokens a step = {train.global_batch:,} sequences of "
        f"{train.seq_len:,}{why}"
    )
    yield (
        f"{found.legal:,} layouts pass check: {found.fitting:,} fit in {_gib(gpu.memory_bytes)}, "
        f"{found.too_large:,} do not; {found.larger_still:,} more, those with a larger micro-batch, were not priced"
    )


def _answer(proposal: Proposal) -> Iterator[str]:
    found = proposal.found
    if not found.best:
        yield _nothing_fits(proposal)
        return
    yield table(found.best, proposal.machine.gpu.memory_bytes, proposal.own)
    yield "\n".join(_convention(proposal))
    yield "\n".join(_comparison(found.best))
    yield _stages_table("Memory of the first, fullest rank of each stage, GiB:", found.best[0].estimate.stages)
    yield f"A step of the first: {_parts(found.best[0].estimate.seconds)}."
    if proposal.bill is not None and proposal.machine.gpu.power_watts:
        yield "\n".join(_bill_lines(proposal.bill, proposal))
    if not proposal.is_model_file:
        text = run_file(proposal.request.config, found.best[0].run, Path(), run_file_comment(proposal, found.best[0]))
        yield f"To train the first (--write FILE saves it; base is relative to the file's folder):\n\n{text.rstrip()}"


def table(candidates: Sequence[Candidate], memory_bytes: int, own: Candidate | None = None) -> str:
    """A row for each, in the order given, and one for the file's own layout."""
    rows: list[tuple[str, ...]] = [TABLE_HEAD]
    rows += [(str(i), *_row(candidate.estimate, memory_bytes)) for i, candidate in enumerate(candidates, start=1)]
    if own is not None:
        rows.append(("file", *_row(own.estimate, memory_bytes)))
    return _aligned(rows)


def _row(price: Estimate, memory_bytes: int) -> tuple[str, ...]:
    layout = price.layout
    free = f"{(memory_bytes - price.peak_bytes) / GIB:.1f}" if memory_bytes < UNKNOWN_BYTES else "?"
    return (
        str(layout.tensor), "yes" if layout.sequence else "no", str(layout.pipeline), str(layout.virtual_pipeline),
        str(layout.expert), str(layout.context), str(layout.data), str(layout.zero), str(layout.micro_batch),
        layout.recompute, layout.precision,
        f"{price.peak_bytes / GIB:.1f}", free,
        f"{price.seconds.total:.3g}" if price.seconds.total < 100 else f"{price.seconds.total:.1f}",
        _count(price.tokens_per_second * SECONDS_PER_DAY), f"{100 * price.mfu:.1f}", f"{100 * price.hfu:.1f}",
    )  # fmt: skip


def _convention(proposal: Proposal) -> Iterator[str]:
    gpu = proposal.machine.gpu
    peaks = " and ".join(f"{gpu.peak(precision) / 1e12:g} TFLOP/s ({precision})" for precision in proposal.precisions)
    yield f"MFU: {CONVENTION}; over a dense peak of {peaks} per {gpu.name}. HFU counts what is computed again too."
    yield f"Peak and memory of {gpu.name}: {gpu.source}."
    if proposal.own is not None:
        yield "file: the layout that the file has itself; it does not fit if it has less than nothing free."
    yield "Memory: fullest rank, 99th percentile of routing skew, reserve of CUDA and of the allocator included."


def _comparison(best: Sequence[Candidate]) -> Iterator[str]:
    first = best[0].estimate
    yield f"First: {layout_words(first.layout)}."
    if len(best) == 1:
        yield "It is the only one that fits."
        return
    second = best[1].estimate
    slower = second.seconds.total - first.seconds.total
    share = 100 * slower / first.seconds.total
    if share < LEAST_SHARE:
        yield f"Second: {layout_words(second.layout)}. As fast, with {_memory_difference(first, second)}."
        return
    gains, pays = differences(first.seconds, second.seconds)
    text = f"It beats the second by {slower:.3g} s a step ({share:.1f} %): {gains or 'in small parts'}"
    yield f"{text}; it pays {pays}." if pays else f"{text}."
    yield f"Second: {layout_words(second.layout)}. It takes that time with {_memory_difference(first, second)}."


def differences(first: StepSeconds, second: StepSeconds) -> tuple[str, str]:
    """In which parts `first` is faster than `second` and in which slower, the largest, as two lists in words."""
    rows = [(field.name, asdict(first)[field.name] - asdict(second)[field.name]) for field in fields(first)]
    rows = [(name, delta) for name, delta in rows if abs(delta) > LEAST_PART * first.total]
    rows.sort(key=lambda row: -abs(row[1]))

    def words(sign: int) -> str:
        chosen = [row for row in rows if row[1] * sign > 0][:MOST_PARTS]
        return ", ".join(f"{'less' if sign < 0 else 'more'} {_words(name)} ({delta:+.3g} s)" for name, delta in chosen)

    return words(-1), words(1)


def _memory_difference(first: Estimate, second: Estimate) -> str:
    delta = (second.peak_bytes - first.peak_bytes) / GIB
    if abs(delta) < 0.05:
        return "as much memory"
    return f"{abs(delta):.1f} GiB {'less' if delta < 0 else 'more'} in use on the fullest rank"


def _parts(seconds: StepSeconds) -> str:
    parts = sorted(asdict(seconds).items(), key=lambda part: -part[1])
    total = seconds.total
    shown = [f"{_words(name)} {100 * value / total:.1f} %" for name, value in parts if value > LEAST_PART * total]
    return f"{total:.3g} s, {', '.join(shown)}"


def _words(name: str) -> str:
    return WORDS.get(name, name)


def _stages_table(title: str, stages: Sequence[StageBytes]) -> str:
    names = [field.name for field in fields(StageBytes)]
    rows = [("stage", *names, "total")]
    start = 0
    for i in range(1, len(stages) + 1):
        if i == len(stages) or stages[i] != stages[start]:
            label = str(start) if i - start == 1 else f"{start}-{i - 1}"
            sizes = [asdict(stages[start])[name] for name in names]
            rows.append((label, *(f"{size / GIB:.2f}" for size in (*sizes, stages[start].total))))
            start = i
    return f"{title}\n{_aligned(rows)}"


def _bill_lines(bill: Bill, proposal: Proposal) -> Iterator[str]:
    yield (
        f"{_count(bill.tokens)} tokens at this speed: {bill.days:,.1f} days, {bill.gpu_hours:,.0f} GPU-hours, "
        "without interruptions and smaller batches (`megagrok scale` counts failures)."
    )
    yield (
        f"Energy, at most: {bill.megawatts:.2f} MW, {bill.megawatt_hours:,.0f} MWh (boards at "
        f"{proposal.machine.gpu.power_watts} W x {SERVER_FACTOR:.2f} for the server x PUE {PUE})."
    )
    if bill.dollars is not None:
        yield f"GPU-hours: ${bill.dollars:,.0f} at ${proposal.request.dollars_per_gpu_hour:g} each."
    if bill.power_dollars is not None:
        rate = proposal.request.dollars_per_kilowatt_hour
        yield f"Energy: ${bill.power_dollars:,.0f} at most, at ${rate:g} per kWh."


def _nothing_fits(proposal: Proposal) -> str:
    nearest, gpu = proposal.found.nearest, proposal.machine.gpu
    assert nearest is not None, "a search that finds nothing knows what came nearest"
    price = nearest.estimate
    fullest = max(range(len(price.stages)), key=lambda i: price.stages[i].total)
    over = (price.peak_bytes - gpu.memory_bytes) / GIB
    lines = [
        f"Nothing fits in {gpu.memory_bytes / GIB:.1f} GiB. Nearest: {layout_words(price.layout)}; the fullest rank of "
        f"stage {fullest} would hold {price.peak_bytes / GIB:.1f} GiB, {over:.1f} too many.",
        _stages_table("Fullest rank of that stage, GiB:", (price.stages[fullest],)),
    ]
    if proposal.enough_gpus is not None:
        lines.append(
            f"What would help: {proposal.enough_gpus:,} GPUs hold it (doubling from {proposal.request.gpus:,})."
        )
    if proposal.larger_gpus:
        lines.append(f"As many GPUs with more memory hold the nearest layout: {', '.join(proposal.larger_gpus)}.")
    if proposal.enough_gpus is None and not proposal.larger_gpus:
        lines.append(
            "Neither 64 times as many GPUs nor any GPU of the table helps: shorten train.seq_len or the model."
        )
    return "\n".join(lines)


def _calibrated(calibration: Calibration) -> str:
    if calibration.told_apart:
        factors = f"computing x {calibration.compute:.3f}, communication x {calibration.communication:.3f}"
    else:
        factors = f"every part x {calibration.compute:.3f}: the runs do not tell computing and communication apart"
    return f"Calibrated with {len(calibration.runs)} measured run(s) on {calibration.gpu.name}: {factors}."


def calibration_text(calibration: Calibration) -> str:
    """Each run before and after, and the factors."""
    rows = [("run", "ranks", "steps", "measured s", "predicted s", "error %", "calibrated %")]
    for run in calibration.runs:
        error = run.predicted.total / run.measured_seconds - 1
        rows.append(
            (
                run.name, str(run.ranks), str(run.steps), f"{run.measured_seconds:.4g}", f"{run.predicted.total:.4g}",
                f"{100 * error:+.1f}", f"{100 * calibration.error(run):+.1f}",
            )
        )  # fmt: skip
    text = f"{_aligned(rows)}\n{_calibrated(calibration)}"
    if calibration.gpu.name == "cpu":
        peak = calibration.gpu.bf16_flops / 1e9
        text += f"\nThe CPU: {peak:.3g} GFLOP/s per rank; {calibration.gpu.source}."
    return text


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    price = candidate.estimate
    return {
        "layout": asdict(price.layout),
        "stages": [{**asdict(stage), "total": stage.total} for stage in price.stages],
        "seconds": {**asdict(price.seconds), "total": price.seconds.total},
        "peak_bytes": price.peak_bytes,
        "tokens_per_second": price.tokens_per_second,
        "mfu": price.mfu,
        "hfu": price.hfu,
    }


def _gib(memory_bytes: int) -> str:
    return "a memory of unknown size" if memory_bytes >= UNKNOWN_BYTES else f"{memory_bytes / GIB:.1f} GiB"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
