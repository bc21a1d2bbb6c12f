"""The norm before the step counts each element once in every layout; dropped gradients leave nothing behind."""

from dataclasses import dataclass

import pytest
import tolerance
import torch
from layouts import MODEL, TIED, batch_of, copies, in_tiers, make_run, start
from ranks import run_ranks

from megagrok.checkpoint import Fragment
from megagrok.config.schema import ParallelConfig
from megagrok.engine.engine import Update, build_engine
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

LAYOUTS = {
    "ZeRO 0, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=0), "fp32"),
    "ZeRO 1, experts": (MODEL, ParallelConfig(data=2, expert=2), "fp32"),
    "ZeRO 1, tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2), "fp32"),
    "ZeRO 1, stages": (TIED, ParallelConfig(pipeline=2), "fp32"),
    "ZeRO 2, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=2), "fp32"),
    "ZeRO 1, context": (MODEL, ParallelConfig(context=2), "fp32"),
    "bf16, experts": (MODEL, ParallelConfig(data=2, expert=2), "bf16"),
    "bf16, stages": (TIED, ParallelConfig(pipeline=2), "bf16"),
    "everything": (MODEL, ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2), "fp32"),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rank's view of a step whose gradients were dropped, and of the same step learnt from afterwards."""

    norm: float
    dropped: Update
    before: list[Fragment]
    after: list[Fragment]
    updates: tuple[int, int]
    expected: Update
    next_update: Update
    learnt: list[Fragment]
    expected_learnt: list[Fragment]


def refuse(ranks: Ranks, name: str) -> Refusal:
    model, parallel, precision = LAYOUTS[name]
    run = make_run(model, parallel, precision=precision)
    groups = start(run)
    untouched = build_engine(run, groups, find_platform())
    untouched.forward_backward(batch_of(run, 0, groups))
    expected = untouched.update(1e-2)
    engine = build_engine(run, groups, find_platform())
    before = copies(engine.state_fragments())
    engine.forward_backward(batch_of(run, 1, groups))
    engine.reduce_gradients()
    engine.gradient_norm()
    dropped = engine.drop_gradients()
    after = copies(engine.state_fragments())
    updates = engine.num_updates
    engine.forward_backward(batch_of(run, 0, groups))
    engine.reduce_gradients()
    norm = engine.gradient_norm()
    next_update = engine.step(1e-2)
    return Refusal(
        norm,
        dropped,
        before,
        after,
        (updates, engine.num_updates),
        expected,
        next_update,
        copies(engine.state_fragments()),
        copies(untouched.state_fragments()),
    )


def assert_same(actual: list[Fragment], expected: list[Fragment]) -> None:
    for fragment, other in zip(actual, expected, strict=True):
        assert fragment.name == other.name and torch.equal(fragment.data, other.data), fragment.name


@pytest.mark.parametrize(
    "name",
    in_tiers(
        LAYOUTS,
        slow=("ZeRO 1, experts", "ZeRO 1, context", "ZeRO 2, experts", "bf16, stages", "bf16, experts", "everything"),
    ),
)
def test_gradients_that_are_dropped_leave_nothing_and_the_norm_is_that_of_the_step(name: str) -> None:
    for rank in run_ranks(refuse, world_size(LAYOUTS[name][1]), name=name):
        assert rank.expected.is_applied and not rank.dropped.is_applied
        assert rank.norm == pytest.approx(rank.expected.grad_norm, rel=tolerance.LAYOUT_GRAD_NORM)
        assert_same(rank.after, rank.before)
        assert rank.updates == (0, 1)
        # Moments, router loads and weights: the step after it is the first step.
        assert rank.next_update == rank.expected
        assert_same(rank.learnt, rank.expected_learnt)
