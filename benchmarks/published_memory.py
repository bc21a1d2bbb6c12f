"""The planner's memory beside what published runs say they allocated. `python benchmarks/published_memory.py`.

What a source reports is not the same moment everywhere. Megatron-Bridge reports the peak of a step. nanotron forgets
its peak after the forward and backward passes of each of the first steps, in which its table is written
(nanotron trainer.py, log_memory), so its figure is the peak of the optimizer's update: weights, gradients, optimizer
state and buffers, without activations. It is in units of 2^30 bytes, whatever its column is called.

What no row says is how a trainer keeps AdamW's moments. The predictions take fp32. Some recipes of Megatron-Bridge keep
them in bf16: Moonlight's (recipes/moonlight/moonlight_16b.py: exp_avg_dtype and exp_avg_sq_dtype are bfloat16), whose
six rows are the outliers; a column tells what the prediction would be.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.published_runs import PublishedRun, load_runs
from megagrok.plan.memory import params_of_layers, pipeline_layers, state_of
from megagrok.plan.shape import Habits, Shape
from megagrok.plan.stage_memory import stage_memory, update_memory

Moment = Literal["update", "peak"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One published run that tells its memory."""

    line: int
    title: str
    moment: Moment
    published: float
    predicted: float
    state: float
    """Of the predicted: weights, gradients, optimizer."""
    with_bf16_moments: float
    """The prediction if the trainer kept AdamW's moments in bf16, which rows do not say."""

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of what was published."""
        return self.predicted / self.published - 1


@dataclass(frozen=True, slots=True)
class MemorySummary:
    """Rows of one family, as shares of what was published."""

    family: str
    rows: int
    mape: float
    median: float
    worst: MemoryRow


def memory_rows(runs: Iterable[PublishedRun] | None = None) -> list[MemoryRow]:
    """Every run that tells its memory, in the order of the file."""
    given = load_runs()[0] if runs is None else runs
    return [_row(run) for run in given if run.allocated_bytes is not None]


def summaries(rows: list[MemoryRow]) -> list[MemorySummary]:
    """Of what is compared at the update, of the peaks, and of both."""
    families = {
        "state and update (nanotron)": [row for row in rows if row.moment == "update"],
        "peak (Megatron-Bridge)": [row for row in rows if row.moment == "peak"],
        "all": rows,
    }
    return [
        MemorySummary(
            family,
            len(members),
            statistics.mean(abs(row.deviation) for row in members),
            statistics.median(row.deviation for row in members),
            max(members, key=lambda row: abs(row.deviation)),
        )
        for family, members in families.items()
        if members
    ]


def _row(run: PublishedRun) -> MemoryRow:
    assert run.allocated_bytes is not None
    is_nanotron = run.habits.evens_stages
    shape = run.shape
    habits = _habits(run)
    published = run.allocated_bytes / 1e9 * GIB if is_nanotron else run.allocated_bytes
    layers = pipeline_layers(shape, run.layout.pipeline, habits.evens_stages)
    at = run.layout
    held = params_of_layers(shape, at.tensor, at.pipeline, at.expert, at.expert_tensor, layers[0], 0)
    return MemoryRow(
        run.line,
        run.title,
        "update" if is_nanotron else "peak",
        published,
        _predicted(run, shape, habits),
        state_of(held, at, habits).total,
        _predicted(run, shape, replace(habits, moment_bytes=4)),
    )


def _predicted(run: PublishedRun, shape: Shape, habits: Habits) -> float:
    if run.habits.evens_stages:
        # nanotron's rank 0 writes the table.
        return update_memory(shape, run.layout, habits)[0]
    return float(max(stage.allocated for stage in stage_memory(shape, run.layout, habits)))


def _habits(run: PublishedRun) -> Habits:
    """What the sources of its software say.

    nanotron: torch's DDP keeps buckets of bf16 gradients beside the fp32 sums wherever there is more than one replica;
    ZeRO gathers through flat copies (optim/zero.py, all_gather_coalesced); inputs and gradients of the tensor-parallel
    matrices are gathered in a buffer each (tensor_parallel/functional.py, "allgather" and "allgather2").
    Megatron-Bridge: its recipes sum gradients in bf16 (grad_reduce_in_fp32 = False).
    """
    if run.habits.evens_stages:
        gradients = 6 if run.layout.data > 1 else 4
        return replace(run.habits, gradient_bytes=gradients, gathers_aside=True, gather_buffers=2)
    if "Megatron-Bridge" in run.source:
        return replace(run.habits, gradient_bytes=2)
    return run.habits


def page(rows: list[MemoryRow]) -> list[str]:
    """As Markdown: the summaries, then the rows from worst to best."""
    lines = ["| rows | number | MAPE | median | worst |", "| --- | ---: | ---: | ---: | --- |"]
    for one in summaries(rows):
        worst = f"{one.worst.deviation:+.1%} {one.worst.title}"
        lines.append(f"| {one.family} | {one.rows} | {one.mape:.1%} | {one.median:+.1%} | {worst} |")
    lines += [
        "",
        "| run | published GB | predicted GB | of it state | deviation | with bf16 moments |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: -abs(row.deviation)):
        sizes = f"{row.published / 1e9:.1f} | {row.predicted / 1e9:.1f} | {row.state / 1e9:.1f} | {row.deviation:+.1%}"
        sizes += f" | {row.with_bf16_moments / 1e9:.1f}, {row.with_bf16_moments / row.published - 1:+.1%}"
        lines.append(f"| {row.title} ({row.moment}) | {sizes} |")
    return lines


if __name__ == "__main__":
    print("\n".join(page(memory_rows())))
