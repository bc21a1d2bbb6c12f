"""What `scale` found, as text that reads in a terminal and as Markdown alike, and as JSON. Computes none of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megagrok.config.schema import RunConfig
from megagrok.plan.batch import total_samples
from megagrok.plan.checkpoint_interval import Losses, best_interval
from megagrok.plan.estimate import Machine
from megagrok.plan.failures import RATES, detection_seconds
from megagrok.plan.flops import CONVENTION
from megagrok.plan.proposal_text import layout_words
from megagrok.plan.save_cost import HOLD_BYTES_PER_SECOND, STORAGE_BYTES_PER_SECOND, WRITE_BYTES_PER_SECOND
from megagrok.plan.scale import GIB, Assumptions, Kind, Rung, Works


@dataclass(frozen=True, slots=True)
class Scaling:
    """A run's sizes, and what they were found under."""

    run: RunConfig
    machine: Machine
    assumed: Assumptions
    searches: bool
    rungs: Mapping[Kind, Sequence[Rung]]

    @property
    def tokens(self) -> int:
        """That the run trains on, batch ramp included."""
        return total_samples(self.run.train) * self.run.train.seq_len


def to_text(scaling: Scaling, picture: str = "") -> str:
    """Tables and what they rest on. picture: a file to show, beside which the text will lie."""
    run, gpu = scaling.run, scaling.machine.gpu
    precision = run.train.precision
    which = "the fastest layout at each size" if scaling.searches else f"{_layout(run)}, with more replicas"
    parts = [
        f"# {run.name} on ever more {gpu.name}",
        f"{scaling.tokens / 1e12:.3g} T tokens in {precision}; {which}. Estimates, not measurements.",
        *([f"![{run.name}: step, MFU, ETTR and tokens a day over GPUs]({picture})"] if picture else []),
    ]
    for kind, rungs in scaling.rungs.items():
        parts += [f"## {_TITLES[kind]}", _table(_columns(scaling), rungs), *_notes(rungs)]
    first = next(iter(scaling.rungs.values()))
    if not scaling.searches and not any(rung.works for rungs in scaling.rungs.values() for rung in rungs):
        parts.append("No size works in this layout. `--best` searches each size for one that does.")
    if any(rung.works for rung in first):
        parts += ["## Effective training time by failure rate", _RATES_TEXT, _rates(first)]
    return "\n\n".join([*parts, "## What this rests on", "\n".join(_basis(scaling))])


def to_json(scaling: Scaling) -> str:
    """Everything, per size."""
    found = {
        "run": scaling.run.name,
        "gpu": scaling.machine.gpu.name,
        "gpus_per_node": scaling.machine.gpus_per_node,
        "tokens": scaling.tokens,
        "searches": scaling.searches,
        "mfu_convention": CONVENTION,
        "assumed": asdict(scaling.assumed),
        "rungs": {kind: [asdict(rung) for rung in rungs] for kind, rungs in scaling.rungs.items()},
    }
    return json.dumps(found, indent=1, allow_nan=False)


_Column = tuple[str, Callable[[Works], str]]
_TITLES: Mapping[Kind, str] = {
    "strong": "Strong scaling: the same batch on more GPUs",
    "weak": "Weak scaling: the same batch for each GPU",
}
_RATES_TEXT = "At the best interval of each; rows are the sizes of the first table that work."


def _layout(run: RunConfig) -> str:
    axes = run.parallel
    return (
        f"the run's own layout (tensor {axes.tensor}, context {axes.context}, pipeline {axes.pipeline}, expert "
        f"{axes.expert})"
    )


def _columns(scaling: Scaling) -> list[_Column]:
    """Heads, and what is written below them of a size that works."""
    more: list[_Column] = []
    if scaling.assumed.dollars_per_gpu_hour is not None:
        more.append(("dollars", lambda works: _short(works.bill.dollars if works.bill else None)))
    if scaling.searches:
        more.append(("layout", lambda works: layout_words(works.estimate.layout)))
    return [
        ("step, s", lambda works: _short(works.estimate.seconds.total)),
        ("MFU", lambda works: f"{works.estimate.mfu:.1%}"),
        ("GiB a GPU", lambda works: f"{works.estimate.peak_bytes / GIB:.0f}"),
        ("Mi tokens a step", lambda works: _short(works.tokens_per_step / 2**20)),
        ("failures a day", lambda works: f"{works.failures_per_day:.2g}"),
        ("save every", lambda works: f"{_steps(works.interval.steps)} = {_time(works.interval.seconds)}"),
        ("ETTR", lambda works: f"{works.interval.ettr:.1%}"),
        ("ETTR as set", lambda works: f"{works.ettr_as_set:.1%}"),
        ("tokens a day", lambda works: _short(works.tokens_per_day)),
        ("days", lambda works: _short(works.bill.days if works.bill else None)),
        ("GPU-hours", lambda works: _short(works.bill.gpu_hours if works.bill else None)),
        *more,
    ]


def _table(columns: Sequence[_Column], rungs: Sequence[Rung]) -> str:
    heads = ["GPUs", *(head for head, _ in columns)]
    rows = []
    for rung in rungs:
        cells = [write(rung.works) for _, write in columns] if rung.works else [""] * len(columns)
        rows.append([f"{rung.gpus:,}", *cells])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [_line(heads, widths), _line(["-" * (width - 1) + ":" for width in widths], widths)]
    for rung, row in zip(rungs, rows, strict=True):
        # A reason spans the row: its first cells are as long as it is, and Markdown takes that.
        lines.append(_line(row, widths) if rung.works else f"| {row[0]:>{widths[0]}} | {rung.problem} |")
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"


def _notes(rungs: Sequence[Rung]) -> list[str]:
    """Each note once, with the sizes that it is about."""
    about: dict[str, list[str]] = {}
    for rung in rungs:
        for note in rung.works.notes if rung.works else ():
            about.setdefault(note, []).append(f"{rung.gpus:,}")
    return ["\n".join(f"- {', '.join(sizes)} GPUs: {note}." for note, sizes in about.items())] if about else []


def _rates(rungs: Sequence[Rung]) -> str:
    heads = ["GPUs", *(rate.name for rate in RATES)]
    rows = [[f"{rung.gpus:,}", *_ettrs(rung.gpus, rung.works)] for rung in rungs if rung.works]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(_line(row, widths) for row in [heads, ["-" * (width - 1) + ":" for width in widths], *rows])


def _ettrs(gpus: int, works: Works) -> list[str]:
    save, step = works.save, works.estimate.seconds.total
    losses = [
        Losses(rate.mtbf_seconds(gpus), save.hold_seconds, save.write_seconds, works.recovery_seconds) for rate in RATES
    ]
    return [f"{best_interval(step, each).ettr:.1%}" for each in losses]


def _basis(scaling: Scaling) -> list[str]:
    assumed, run = scaling.assumed, scaling.run
    works = [rung.works for rungs in scaling.rungs.values() for rung in rungs if rung.works]
    hold = f"a rank's bytes at {HOLD_BYTES_PER_SECOND / 1e9:.3g} GB/s (docs/bench/checkpoint.md, between host buffers)"
    if assumed.hold_seconds is not None:
        hold = f"{assumed.hold_seconds:.3g} s (--checkpoint-seconds)"
    lines = [
        f"- MFU: {CONVENTION}; {run.train.precision} peak of {scaling.machine.gpu.name}, "
        f"{scaling.machine.gpu.peak(run.train.precision) / 1e12:.4g} TFLOP/s ({scaling.machine.gpu.source}).",
        f"- Failures: {assumed.failures.per_gpu_day:.3g} a GPU-day, in proportion to GPUs. {assumed.failures.source}.",
        f"- Back to training: found after {detection_seconds(run.watch.step_seconds):.3g} s on average, "
        f"{assumed.restart_seconds:.4g} s to start again (an assumption: --restart-seconds), then reading.",
        f"- A save holds the steps for {hold}; it is in place after a rank's bytes at "
        f"{WRITE_BYTES_PER_SECOND / 1e9:.3g} GB/s. All ranks together write and read at most "
        f"{STORAGE_BYTES_PER_SECOND / 1e12:.3g} TB/s; every rank reads its own weights.",
        "- ETTR: time of steps that count over all time but queues, Daly's complete model "
        "(megagrok/plan/checkpoint_interval.py), at the best interval; as set: at the run's checkpoint.every_steps = "
        f"{run.checkpoint.every_steps}.",
    ]
    if works:
        worst = max((work.interval.young_error for work in works), key=abs)
        lines.append(f"- Young's first-order interval sqrt(2 H M) is off by {worst:.1%} at the most.")
        lines.append("- Tokens a day are those that count; days and GPU-hours are to the run's last token.")
    return lines


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _short(value: float | None) -> str:
    if value is None:
        return "never"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
