"""One run on ever more GPUs: its step, its failures, and what is left of a day, from the planner's estimates.

Strong scaling keeps the global batch of the run, so that every size trains the same model in fewer days. Weak scaling
keeps the batch of each GPU, so that every size does the same work for a step; what the model learns from ever larger
batches is not the same, and a size whose batch no run has shown to be of use says so. The run's batch ramp is left out:
a size that its first batches do not divide over says that, too.

Sizes take the run's own layout with more replicas (what changing parallel.data alone gives), or the fastest that
`search` finds for each. A size that cannot run stays in the list with its reason.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megagrok.config.schema import RunConfig
from megagrok.errors import ConfigError
from megagrok.plan.batch import total_samples, world_size
from megagrok.plan.check import check
from megagrok.plan.checkpoint_interval import Interval, Losses, best_interval, ettr
from megagrok.plan.estimate import Estimate, Machine, estimate
from megagrok.plan.failures import DAY, RATES, RESTART_SECONDS, FailureRate, detection_seconds
from megagrok.plan.price import Bill, bill
from megagrok.plan.save_cost import SaveCost, save_cost
from megagrok.plan.search import search
from megagrok.plan.shape import Layout, Shape

Kind = Literal["strong", "weak"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_GPUS = 2**20
GIB = 2**30
_RAMP = ((0.0, 16), (69e9, 32), (790e9, 64), (4.7e12, 128))
"""Batches of MiniMax-Text-01 in 2^20 tokens, each from so many trained tokens on: doubled when the loss reached what a
fitted law of the critical batch asked for, arXiv:2501.08313 sec. 4.2."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan cannot know of a cluster, with what is taken for it otherwise."""

    failures: FailureRate = RATES[0]
    restart_seconds: float = RESTART_SECONDS
    hold_seconds: float | None = None
    """That a save holds the steps; None takes ours (`save_cost`)."""
    dollars_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Works:
    """What a run is at one size. Seconds and tokens are of the whole job."""

    estimate: Estimate
    tokens_per_step: int
    failures_per_day: float
    save: SaveCost
    recovery_seconds: float
    """From a failure to the next step: found out, started again, checkpoint read."""
    interval: Interval
    ettr_as_set: float
    """With the run's own checkpoint.every_steps, instead of the best interval."""
    tokens_per_day: float
    """That count: with failures and saves, at the best interval."""
    bill: Bill | None
    """To the last token of the run, with failures and saves; None if it never gets there."""
    is_beyond_known_batches: bool
    """The batch is larger than `critical_batch` of the run's tokens."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rung:
    """One size: what the run is there, or why it cannot be."""

    gpus: int
    works: Works | None
    problem: str
    """Empty if it works."""


def ladder(text: str) -> tuple[int, ...]:
    """The sizes of "8..131072", each twice the one before, or the one of "512". Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", text)
    if found is None:
        raise ConfigError(f"--gpus {text}, needs a number of GPUs or a range such as 8..131072")
    first = int(found[1])
    last = int(found[2] or first)
    if not 1 <= first <= last <= MOST_GPUS:
        raise ConfigError(f"--gpus {text}, needs 1 <= first <= last <= {MOST_GPUS}")
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != last:
        raise ConfigError(
            f"--gpus {text}, needs a last number that doubling {first} reaches. Fix: {first}..{sizes[-1]} or "
            f"{first}..{2 * sizes[-1]}"
        )
    return tuple(sizes)


def critical_batch(tokens: float) -> int:
    """The largest batch, in tokens, that a published run of mixtures of experts had found use for after so many tokens.

    An indication: it depends on model, data and loss, and this run has to measure its own.
    """
    return max(batch for begin, batch in _RAMP if begin <= tokens) * 2**20


def scale(
    run: RunConfig, machine: Machine, sizes: Sequence[int], kind: Kind, assumed: Assumptions, *, searches: bool = False
) -> tuple[Rung, ...]:
    """The run at each of `sizes`, in their order.

    run: one that `check` accepts.  searches: the fastest layout at each size, instead of the run's own with as many
    replicas as there are GPUs; takes up to seconds a size.
    """
    price = _searched if searches else _replicated
    return tuple(_rung(run, machine, gpus, kind, assumed, price) for gpus in sizes)


@dataclass(frozen=True, slots=True)
class _Priced:
    run: RunConfig
    estimate: Estimate


_Price = Callable[[RunConfig, Machine, int], _Priced | str]


def _rung(run: RunConfig, machine: Machine, gpus: int, kind: Kind, assumed: Assumptions, price: _Price) -> Rung:
    batch = run.train.global_batch
    if kind == "weak":
        batch, rest = divmod(batch * gpus, world_size(run.parallel))
        if rest or not batch:
            per_gpu = run.train.global_batch / world_size(run.parallel)
            return Rung(gpus, None, f"{per_gpu:.3g} samples a GPU make no whole batch on {gpus} GPUs")
    found = price(_with_batch(run, batch), machine, gpus)
    if isinstance(found, str):
        return Rung(gpus, None, found)
    limit = machine.gpu.memory_bytes
    if found.estimate.peak_bytes > limit:
        needed = found.estimate.peak_bytes / GIB
        return Rung(
            gpus, None, f"does not fit: a GPU would need {needed:.0f} GiB, {machine.gpu.name} has {limit / GIB:.0f}"
        )
    return Rung(gpus, _works(run, found, machine, gpus, kind, assumed), "")


def _with_batch(run: RunConfig, batch: int) -> RunConfig:
    """The run at its full batch from the first step on; an evaluation takes a batch, so that it divides as well."""
    return replace(run, train=replace(run.train, global_batch=batch, batch_ramp=(), evaluate_samples=batch))


def _replicated(run: RunConfig, machine: Machine, gpus: int) -> _Priced | str:
    replica = world_size(run.parallel) // run.parallel.data
    if gpus % replica:
        return f"the layout has {replica} ranks a replica, needs a multiple of that"
    grown = replace(run, parallel=replace(run.parallel, data=gpus // replica))
    problems = check(grown)
    if problems:
        return problems[0].text.rstrip(".")
    return _Priced(grown, estimate(Shape.of(run.model), Layout.of(grown), machine))


def _searched(run: RunConfig, machine: Machine, gpus: int) -> _Priced | str:
    found = search(run, gpus, machine, [run.train.precision], top=1)
    if found.best:
        return _Priced(found.best[0].run, found.best[0].estimate)
    if found.nearest is not None:
        return _Priced(found.nearest.run, found.nearest.estimate)
    return f"no layout of this model and batch has {gpus} ranks"


def _works(run: RunConfig, found: _Priced, machine: Machine, gpus: int, kind: Kind, assumed: Assumptions) -> Works:
    step = found.estimate.seconds.total
    save = save_cost(found.run, assumed.hold_seconds)
    recovery = detection_seconds(run.watch.step_seconds) + assumed.restart_seconds + save.load_seconds
    losses = Losses(assumed.failures.mtbf_seconds(gpus), save.hold_seconds, save.write_seconds, recovery)
    interval = best_interval(step, losses)
    tokens = total_samples(run.train) * run.train.seq_len
    speed = found.estimate.tokens_per_second * interval.ettr
    return Works(
        estimate=found.estimate,
        tokens_per_step=found.estimate.layout.tokens,
        failures_per_day=assumed.failures.per_day(gpus),
        save=save,
        recovery_seconds=recovery,
        interval=interval,
        ettr_as_set=ettr(run.checkpoint.every_steps * step, losses),
        tokens_per_day=speed * DAY,
        bill=bill(machine.gpu, gpus, tokens, speed, assumed.dollars_per_gpu_hour) if speed else None,
        is_beyond_known_batches=found.estimate.layout.tokens > critical_batch(tokens),
        notes=tuple(_notes(run, found, kind)),
    )


def _notes(run: RunConfig, found: _Priced, kind: Kind) -> list[str]:
    notes = []
    largest = critical_batch(total_samples(run.train) * run.train.seq_len)
    if found.estimate.layout.tokens > largest:
        notes.append(f"batch above {largest / 2**20:.0f} Mi tokens, the largest that a published run found use for")
    ramp = replace(found.run, train=replace(found.run.train, batch_ramp=run.train.batch_ramp))
    if kind == "strong" and check(ramp):
        smallest = min(stage.global_batch for stage in run.train.batch_ramp)
        notes.append(
            f"the first batches of the ramp ({smallest} samples) do not divide over {found.run.parallel.data} replicas"
        )
    return notes
