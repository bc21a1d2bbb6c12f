"""Every layout of a run that `check` accepts, for a number of ranks. Not a second set of rules: it asks those of check.

The one idea: axes are chosen one after the other, and a rule is asked as soon as the last setting it reads is chosen:
one answer fells a whole branch. What an axis offers is a superset (divisors); what stays is up to the rules. Two
settings follow the axes instead of being chosen: parallel.data is what is left of the ranks, and
train.evaluate_samples is raised to the next multiple that the layout can evaluate.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from megagrok.config.problems import Problem
from megagrok.config.schema import ParallelConfig, Precision, Recompute, RunConfig
from megagrok.plan.check import RULES
from megagrok.plan.rules import Rule

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
Options = Callable[[RunConfig, int], Iterator[RunConfig]]


@dataclass(frozen=True, slots=True)
class Axis:
    """Settings that are chosen together, and the choices that a partly chosen run on so many ranks leaves."""

    keys: tuple[str, ...]
    options: Options


def families(config: RunConfig, world_size: int, precisions: Sequence[Precision]) -> Iterator[list[RunConfig]]:
    """Runs that differ in their layout alone, in families that differ in train.micro_batch alone, smallest first.

    `train.recompute` is left as it is: no rule reads it, every run may have each of RECOMPUTES.  What no layout can
    cure has to be settled before (`unalterable`).
    """
    axes = [*_AXES, Axis(("train.precision",), _precisions(precisions))]
    staged = _staged([*axes, _MICRO_BATCH])
    for run in _choose(config, world_size, axes, staged):
        family = [
            candidate
            for candidate in _MICRO_BATCH.options(run, world_size)
            if _is_accepted(candidate, staged[len(axes)])
        ]
        if family:
            yield family


def unalterable(config: RunConfig) -> list[Problem]:
    """The problems of a run that no layout can cure, by the rules that read nothing of the layout."""
    chosen = {key for axis in (*_AXES, _MICRO_BATCH) for key in axis.keys} | {"train.precision"}
    return [problem for rule in RULES if chosen.isdisjoint(rule.reads) for problem in rule.find(config)]


def _choose(
    run: RunConfig, world_size: int, axes: Sequence[Axis], staged: Sequence[Sequence[Rule]], depth: int = 0
) -> Iterator[RunConfig]:
    if depth == len(axes):
        yield run
        return
    for candidate in axes[depth].options(run, world_size):
        if _is_accepted(candidate, staged[depth]):
            yield from _choose(candidate, world_size, axes, staged, depth + 1)


def _staged(axes: Sequence[Axis]) -> list[list[Rule]]:
    """For each axis the rules for which it is the last to be chosen."""
    depth_of = {key: depth for depth, axis in enumerate(axes) for key in axis.keys}
    staged: list[list[Rule]] = [[] for _ in axes]
    for rule in RULES:
        depths = [depth_of[key] for key in rule.reads if key in depth_of]
        if depths:
            staged[max(depths)].append(rule)
    return staged


def _is_accepted(run: RunConfig, rules: Sequence[Rule]) -> bool:
    return all(next(rule.find(run), None) is None for rule in rules)


def _with(run: RunConfig, parallel: ParallelConfig) -> RunConfig:
    return replace(run, parallel=parallel)


def _all_divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _pipelines(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    for pipeline in _all_divisors(world_size):
        yield _with(run, replace(run.parallel, pipeline=pipeline))


def _chunks(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    for chunks in _all_divisors(run.model.num_layers // run.parallel.pipeline):
        yield _with(run, replace(run.parallel, virtual_pipeline=chunks))


def _tensors(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    for tensor in _all_divisors(world_size // run.parallel.pipeline):
        for sequence in (False, True):
            yield _with(run, replace(run.parallel, tensor=tensor, sequence=sequence))


def _contexts(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    left = world_size // run.parallel.pipeline // run.parallel.tensor
    for context in _all_divisors(left):
        yield _with(run, replace(run.parallel, context=context, data=left // context))


def _experts(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    for expert in _all_divisors(run.model.moe.num_experts):
        yield _with(run, replace(run.parallel, expert=expert))


def _zeros(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    yield _with(run, replace(run.parallel, zero=0))
    yield _with(run, replace(run.parallel, zero=1))
    yield _with(run, replace(run.parallel, zero=2))


def _precisions(precisions: Sequence[Precision]) -> Options:
    def options(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
        for precision in precisions:
            yield replace(run, train=replace(run.train, precision=precision))

    return options


def _micro_batches(run: RunConfig, world_size: int) -> Iterator[RunConfig]:
    train, parallel = run.train, run.parallel
    for micro_batch in _all_divisors(train.global_batch // parallel.data):
        turn = micro_batch * parallel.data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        samples = -(-train.evaluate_samples // turn) * turn
        yield replace(run, train=replace(train, micro_batch=micro_batch, evaluate_samples=samples))


_AXES = (
    Axis(("parallel.pipeline",), _pipelines),
    Axis(("parallel.tensor", "parallel.sequence"), _tensors),
    Axis(("parallel.context", "parallel.data"), _contexts),
    Axis(("parallel.virtual_pipeline",), _chunks),
    Axis(("parallel.expert",), _experts),
    Axis(("parallel.zero",), _zeros),
)
_MICRO_BATCH = Axis(("train.micro_batch", "train.evaluate_samples"), _micro_batches)
