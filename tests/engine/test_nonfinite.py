"""One gradient that is not finite, anywhere: no rank moves anything, all say so, and the next step is a normal one."""

from dataclasses import dataclass

import pytest
import torch
from layouts import MODEL, TIED, batch_of, copies, in_tiers, make_run, start
from ranks import run_ranks
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.config.schema import ParallelConfig
from megagrok.engine.engine import Engine, Update, build_engine
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

LAYOUTS = {
    "ZeRO 0, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=0), "fp32"),
    "ZeRO 0, stages": (TIED, ParallelConfig(pipeline=2, zero=0), "fp32"),
    "ZeRO 1, experts": (MODEL, ParallelConfig(data=2, expert=2), "fp32"),
    "ZeRO 1, tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2), "fp32"),
    "ZeRO 1, stages": (TIED, ParallelConfig(pipeline=2), "fp32"),
    "ZeRO 2, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=2), "fp32"),
    "bf16, experts": (MODEL, ParallelConfig(data=2, expert=2), "bf16"),
    "bf16, stages": (TIED, ParallelConfig(pipeline=2), "bf16"),
}
# Which parameter is struck, by what, on which rank.
STRIKES = (("expert", float("nan"), 1), ("dense", float("inf"), 0), ("norm", float("-inf"), 1))


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What one rank saw of a step that one of the ranks struck, and of the normal step after it."""

    update: Update
    before: list[Fragment]
    after: list[Fragment]
    weights_before: list[Tensor]
    weights_after: list[Tensor]
    next_update: Update


def strike(engine: Engine, kind: str, value: float) -> None:
    """Put `value` into one element of one accumulated gradient of this rank."""
    for item in engine.local_parameters:
        name = item.parts[0].name
        is_struck = {
            "expert": item.is_expert,
            "norm": name.endswith("norm.weight"),
            "dense": not item.is_expert and not name.endswith("norm.weight"),
        }[kind]
        if is_struck:
            engine._gradient_of(item.parameter).view(-1)[-1] = value
            return


def weights(engine: Engine) -> list[Tensor]:
    return [item.parameter.detach().clone() for item in engine.local_parameters]


def survive(ranks: Ranks, name: str) -> tuple[list[Aftermath], Update]:
    """For each strike its aftermath; and the step of an engine that nothing struck."""
    model, parallel, precision = LAYOUTS[name]
    run = make_run(model, parallel, precision=precision)
    groups = start(run)
    batch = batch_of(run, 0, groups)
    untouched = build_engine(run, groups, find_platform())
    untouched.forward_backward(batch)
    expected = untouched.update(1e-2)
    aftermaths = []
    for kind, value, struck_rank in STRIKES:
        engine = build_engine(run, groups, find_platform())
        before, weights_before = copies(engine.state_fragments()), weights(engine)
        engine.forward_backward(batch)
        if ranks.rank == struck_rank:
            strike(engine, kind, value)
        update = engine.update(1e-2)
        after, weights_after = copies(engine.state_fragments()), weights(engine)
        engine.forward_backward(batch)
        next_update = engine.update(1e-2)
        aftermaths.append(Aftermath(update, before, after, weights_before, weights_after, next_update))
    return aftermaths, expected


@pytest.mark.parametrize(
    "name", in_tiers(LAYOUTS, slow=("ZeRO 0, stages", "ZeRO 1, experts", "ZeRO 1, stages", "bf16, experts"))
)
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told_to_all(name: str) -> None:
    for aftermaths, expected in run_ranks(survive, world_size(LAYOUTS[name][1]), name=name):
        assert expected.is_applied
        for aftermath in aftermaths:
            assert not aftermath.update.is_applied
            assert not aftermath.update.grad_norm < float("inf")
            for fragment, unmoved in zip(aftermath.after, aftermath.before, strict=True):
                assert fragment.name == unmoved.name and torch.equal(fragment.data, unmoved.data), fragment.name
            for weight, unmoved in zip(aftermath.weights_after, aftermath.weights_before, strict=True):
                assert torch.equal(weight, unmoved)
            # Nothing of the struck gradient is left: the step after it is the first step.
            assert aftermath.next_update == expected


def overflow_of_a_loss(ranks: Ranks) -> list[tuple[float, bool]]:
    """A weight of infinity on one rank: the loss itself is not finite."""
    run = make_run(parallel=ParallelConfig(data=2, expert=2))
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    if ranks.rank == 1:
        experts = engine._chunks[0].moe_layers[0].experts
        with torch.no_grad():
            experts.down_eDF[0, 0, 0] = float("inf")
    totals = engine.forward_backward(batch_of(run, 0, groups))
    return [(totals.ce_sum, engine.update(1e-2).is_applied)]


def test_a_loss_that_is_not_finite_is_reported_and_not_learnt_from() -> None:
    for ((loss_sum, is_applied),) in run_ranks(overflow_of_a_loss, 2):
        assert loss_sum != loss_sum and not is_applied
