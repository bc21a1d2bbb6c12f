"""The best layouts of a run on a machine: all that `check` accepts, those that fit its memory, the fastest of these.

Nothing is sampled and nothing is capped. Memory is priced first, time only for what fits. One thing is passed over, and
counted: micro-batches above one that does not fit, because a larger micro-batch never holds less.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter

from megagrok.config.schema import Precision, RunConfig
from megagrok.plan.estimate import Estimate, Machine, StageBytes, StepSeconds, estimate
from megagrok.plan.shape import Layout, Shape, habits_of
from megagrok.plan.space import RECOMPUTES, families
from megagrok.plan.stage_memory import stage_memory
from megagrok.plan.step_time import step_seconds

_numbers = attrgetter(*(field.name for field in fields(Layout)))
FARTHEST_MULTIPLE = 64
"""Of the GPUs asked for, up to which a number that works is looked for where none does."""
Correction = Callable[[StepSeconds], StepSeconds]


def _as_it_is(seconds: StepSeconds) -> StepSeconds:
    return seconds


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout that was chosen, as a run to write down and as its price."""

    run: RunConfig
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Found:
    """What a search saw. Layouts: legal = fitting + too_large + larger_still."""

    best: tuple[Candidate, ...]
    """Those that fit, fastest first."""
    legal: int
    fitting: int
    too_large: int
    """Do not fit."""
    larger_still: int
    """Not priced: as one that does not fit, with a larger micro-batch."""
    nearest: Candidate | None
    """The one with the smallest peak, if none fits."""


def search(
    config: RunConfig,
    world_size: int,
    machine: Machine,
    precisions: Sequence[Precision],
    *,
    top: int,
    correct: Correction = _as_it_is,
) -> Found:
    """The `top` fastest layouts of `config` on `world_size` GPUs; the same input gives the same order.

    correct: a calibration of the estimated seconds.  Equally fast layouts are ordered by memory, then by their numbers.
    """
    shape, habits, limit = Shape.of(config.model), habits_of(config.kernels), machine.gpu.memory_bytes
    legal = too_large = larger_still = 0
    fitting: list[tuple[tuple[object, ...], RunConfig, Layout]] = []
    smallest: tuple[tuple[object, ...], RunConfig, Layout] | None = None
    for family in families(config, world_size, precisions):
        for recompute in RECOMPUTES:
            for i, run in enumerate(family):
                layout = replace(Layout.of(run), recompute=recompute)
                peak = _peak(stage_memory(shape, layout, habits))
                if peak <= limit:
                    seconds = correct(step_seconds(shape, layout, machine, habits)).total
                    fitting.append(((seconds, peak, _numbers(layout)), run, layout))
                    continue
                rank = (peak, _numbers(layout))
                if not fitting and (smallest is None or rank < smallest[0]):
                    smallest = rank, run, layout
                too_large += 1
                larger_still += len(family) - i - 1
                break
            legal += len(family)
    fitting.sort(key=lambda entry: entry[0])
    chosen = [_candidate(run, layout, machine, correct) for _, run, layout in fitting[:top]]
    nearest = _candidate(*smallest[1:], machine, correct) if smallest is not None and not fitting else None
    return Found(tuple(chosen), legal, len(fitting), too_large, larger_still, nearest)


def priced(run: RunConfig, machine: Machine, correct: Correction = _as_it_is) -> Candidate:
    """The layout that a run has, whether it fits or not. It has to be one that `check` accepts."""
    return _candidate(run, Layout.of(run), machine, correct)


def fits(config: RunConfig, world_size: int, machine: Machine, precisions: Sequence[Precision]) -> bool:
    """Whether any layout on so many GPUs fits. The smallest micro-batch of a family is enough to tell."""
    shape, habits = Shape.of(config.model), habits_of(config.kernels)
    return any(
        _peak(stage_memory(shape, replace(Layout.of(family[0]), recompute=recompute), habits))
        <= machine.gpu.memory_bytes
        for family in families(config, world_size, precisions)
        for recompute in RECOMPUTES
    )


def fewest_that_fit(
    config: RunConfig, world_size: int, machine: Machine, precisions: Sequence[Precision]
) -> int | None:
    """The smallest of 2, 4, 8 ... times `world_size` GPUs that holds the run; None if none up to 64 times does."""
    return next((count for count in _doublings(world_size) if fits(config, count, machine, precisions)), None)


def nearest_worlds(
    config: RunConfig, world_size: int, gpus_per_node: int, precisions: Sequence[Precision]
) -> list[int]:
    """The numbers of GPUs next to `world_size`, below and above, in whole nodes, that have any layout at all."""
    step = min(gpus_per_node, world_size)
    down = range(world_size - step, 0, -step)
    up = range(world_size + step, FARTHEST_MULTIPLE * world_size, step)
    found = (next((count for count in way if _has_layout(config, count, precisions)), None) for way in (down, up))
    return [count for count in found if count is not None]


def _has_layout(config: RunConfig, world_size: int, precisions: Sequence[Precision]) -> bool:
    return next(families(config, world_size, precisions), None) is not None


def _doublings(world_size: int) -> Iterator[int]:
    count = 2 * world_size
    while count <= FARTHEST_MULTIPLE * world_size:
        yield count
        count *= 2


def _peak(stages: Sequence[StageBytes]) -> int:
    return max(stage.total for stage in stages)


def _candidate(run: RunConfig, layout: Layout, machine: Machine, correct: Correction) -> Candidate:
    chosen = replace(run, train=replace(run.train, recompute=layout.recompute))
    priced = estimate(Shape.of(run.model), layout, machine, habits_of(run.kernels))
    seconds = correct(priced.seconds)
    slower = seconds.total / priced.seconds.total
    corrected = replace(
        priced,
        seconds=seconds,
        tokens_per_second=priced.tokens_per_second / slower,
        mfu=priced.mfu / slower,
        hfu=priced.hfu / slower,
    )
    return Candidate(chosen, corrected)
