"""What one rank of a layout sees of a few steps, and the parent's view of all ranks together.

A rank reports every copy of every gradient, also those that the engine leaves out of a checkpoint: a difference is
often explained by what another rank's copy holds.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.checkpoint.geometry import slices
from megagrok.config import RunConfig
from megagrok.engine.engine import Engine, StepTotals, Update, build_engine
from megagrok.engine.state import GRADIENT, WEIGHT, cut, is_spoken_for
from megagrok.parallel.groups import ProcessGroups, make_groups
from megagrok.parallel.ranks import ProcessGroupRanks
from megagrok.parallel.topology import Topology
from megagrok.platform import CPU
from megagrok.verify.breaks import BREAKS
from megagrok.verify.choices import BreakName
from megagrok.verify.twin import twin_batch


@dataclass(frozen=True, slots=True)
class Held:
    """A piece of a reduced gradient as one rank has it."""

    fragment: Fragment
    tensor_rank: int
    is_tied_copy: bool
    """Of the last stage; the first stage's embedding is the one that counts."""
    is_spare: bool
    """Another rank's piece counts."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """One rank's part of a step."""

    weights: list[Fragment]
    """Before the step."""
    totals: StepTotals
    gradients: list[Held]
    update: Update


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part of a run."""

    steps: list[RankStep]
    last_weights: list[Fragment]


def witness(ranks: ProcessGroupRanks, run: RunConfig, planted: BreakName | None, timeout_seconds: float) -> RankReport:
    """Train the twin and report. Runs in a rank; collective over all."""
    bug = None if planted is None else BREAKS[planted]
    groups = make_groups(
        Topology.of(run.parallel),
        virtual_pipeline=run.parallel.virtual_pipeline,
        platform=CPU,
        timeout_seconds=timeout_seconds,
    )
    engine = build_engine(run, groups if bug is None else bug.in_groups(groups), CPU)
    if bug is not None:
        bug.in_engine(engine)
    steps = []
    for step in range(run.train.steps):
        weights = _weights(engine)
        totals = engine.forward_backward(twin_batch(run, step, groups.coordinates.data, groups.topology.data))
        if bug is not None:
            bug.in_gradients(engine, groups)
        engine.reduce_gradients()
        gradients = list(_gradients(engine, run, groups))
        steps.append(RankStep(weights, totals, gradients, engine.step(run.optimizer.lr)))
    return RankReport(steps, _weights(engine))


def _weights(engine: Engine) -> list[Fragment]:
    return [_kept(fragment) for fragment in engine.state_fragments() if fragment.name.startswith(f"{WEIGHT}/")]


def _gradients(engine: Engine, run: RunConfig, groups: ProcessGroups) -> Iterator[Held]:
    zero = run.parallel.zero
    for shard, values in engine.gradient_shards():
        owner = shard.owner
        is_spoken = is_spoken_for(owner, groups, zero=zero)
        # Replicas over the data ranks are equal by construction of an all-reduce; those over tensor ranks and stages
        # are what may differ.
        alone = replace(owner, is_tied_copy=False, is_replicated_over_tensor=False)
        if is_spoken or is_spoken_for(alone, groups, zero=zero):
            for fragment in cut(GRADIENT, owner, shard.begin, shard.end, values, run.model):
                yield Held(_kept(fragment), groups.coordinates.tensor, owner.is_tied_copy, not is_spoken)


def _kept(fragment: Fragment) -> Fragment:
    """As it is now: fragments are views of state that moves on."""
    return replace(fragment, data=fragment.data.clone())


@dataclass(frozen=True, slots=True)
class Step:
    """A step as all ranks together saw it. Tensors are fp64, by global name."""

    weights: dict[str, Tensor]
    totals: list[StepTotals]
    """By rank; meant to be equal."""
    gradients: dict[str, Tensor]
    copies: dict[str, list[Tensor]]
    """For parameters of which several ranks hold all: each holder's gradient, the one that counts first."""
    updates: list[Update]
    squares: dict[tuple[str, int], float]
    """For each parameter the square of its gradient that lies on each tensor rank; spare copies are not in it."""


def gather(reports: list[RankReport]) -> tuple[list[Step], dict[str, Tensor]]:
    """Put the ranks' pieces together: all steps, and the weights after the last one."""
    steps = [_gather_step([report.steps[number] for report in reports]) for number in range(len(reports[0].steps))]
    return steps, whole(fragment for report in reports for fragment in report.last_weights)


def _gather_step(parts: list[RankStep]) -> Step:
    held = [piece for part in parts for piece in part.gradients]
    squares: dict[tuple[str, int], float] = defaultdict(float)
    for piece in held:
        if not piece.is_spare:
            square = float(piece.fragment.data.double().square().sum())
            squares[_bare(piece.fragment.name), piece.tensor_rank] += square
    spares: dict[tuple[bool, int], list[Fragment]] = defaultdict(list)
    for piece in held:
        if piece.is_spare:
            # A spare of a split matrix is the tied copy, whose tensor ranks hold different rows of one copy.
            spares[piece.is_tied_copy, 0 if piece.is_tied_copy else piece.tensor_rank].append(piece.fragment)
    gradients = whole(piece.fragment for piece in held if not piece.is_spare)
    copies = {name: [gradient] for name, gradient in gradients.items()}
    for fragments in spares.values():
        for name, copy in whole(fragments).items():
            copies[name].append(copy)
    return Step(
        weights=whole(fragment for part in parts for fragment in part.weights),
        totals=[part.totals for part in parts],
        gradients=gradients,
        copies={name: tensors for name, tensors in copies.items() if len(tensors) > 1},
        updates=[part.update for part in parts],
        squares=dict(squares),
    )


def whole(fragments: Iterable[Fragment]) -> dict[str, Tensor]:
    """Global tensors from the pieces of all ranks, in fp64. Fails unless every element came exactly once."""
    tensors: dict[str, Tensor] = {}
    counted: Mapping[str, list[int]] = defaultdict(list)
    for fragment in fragments:
        name = _bare(fragment.name)
        tensor = tensors.get(name)
        if tensor is None:
            tensor = tensors[name] = torch.full(fragment.global_shape, torch.nan, dtype=torch.float64)
        taken = 0
        for box in fragment.piece.boxes():
            tensor[slices(box, (0,) * len(box.start))] = fragment.data[taken : taken + box.size].view(box.shape)
            taken += box.size
        counted[name].append(taken)
    for name, tensor in tensors.items():
        assert sum(counted[name]) == tensor.numel(), f"{name}: {sum(counted[name])} of {tensor.numel()} elements came"
    return tensors


def _bare(name: str) -> str:
    return name.partition("/")[2]
