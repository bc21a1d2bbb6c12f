"""AdamW as configured: what is decayed, how a gradient is clipped, and a state that knows how far it has come."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import tolerance
from layouts import (
    MODEL,
    TIED,
    Oracle,
    Step,
    assert_close,
    batch_of,
    copies,
    distance,
    in_tiers,
    make_run,
    of_kind,
    start,
    take_step,
    whole,
)
from ranks import run_ranks
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.model.init import initial_value
from megagrok.model.names import EMBEDDING, is_decayed, parameter_shapes
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

LAYOUTS = {
    "one rank": (MODEL, ParallelConfig()),
    "ZeRO 0, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=0)),
    "ZeRO 0, tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, zero=0)),
    "ZeRO 1, experts over tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "ZeRO 1, tied stages": (TIED, ParallelConfig(pipeline=2)),
    "ZeRO 0, tied stages": (TIED, ParallelConfig(pipeline=2, zero=0)),
    "ZeRO 2, data": (MODEL, ParallelConfig(data=2, zero=2)),
}


PLAIN = OptimizerConfig(lr=1e-2, eps=1e-4, clip_norm=0.0, weight_decay=0.0)
DECAYED = replace(PLAIN, weight_decay=0.3)
CLIPPED = replace(PLAIN, clip_norm=0.25)
WITHIN = replace(PLAIN, clip_norm=1000.0)
TRAINED = replace(PLAIN, clip_norm=0.5, weight_decay=0.1)
NUM_STEPS = {PLAIN: 1, DECAYED: 1, CLIPPED: 1, WITHIN: 1, TRAINED: 5}


@dataclass(frozen=True, slots=True)
class Result:
    """What an engine of one setting did: every rank's steps, and the whole state after them."""

    by_rank: list[list[Step]]
    state: dict[str, Tensor]


def after_steps(
    ranks: Ranks, model: ModelConfig, parallel: ParallelConfig
) -> dict[OptimizerConfig, tuple[list[Step], list[Fragment]]]:
    """For each setting of the optimizer: its steps, and the state they end in."""
    groups = start(make_run(model, parallel))
    results = {}
    for optimizer, num_steps in NUM_STEPS.items():
        run = make_run(model, parallel, optimizer)
        engine = build_engine(run, groups, find_platform())
        steps = [take_step(engine, batch_of(run, number, groups), optimizer.lr) for number in range(num_steps)]
        results[optimizer] = (steps, copies(engine.state_fragments()))
    return results


@cache
def results_of(name: str) -> dict[OptimizerConfig, Result]:
    """One start of ranks for all settings of a layout."""
    model, parallel = LAYOUTS[name]
    by_rank = run_ranks(after_steps, world_size(parallel), model=model, parallel=parallel)
    return {
        optimizer: Result(
            [result[optimizer][0] for result in by_rank], whole(result[optimizer][1] for result in by_rank)
        )
        for optimizer in NUM_STEPS
    }


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("ZeRO 0, tensor", "ZeRO 1, tied stages")))
def test_matrices_are_decayed_and_norms_and_the_embedding_are_not(name: str) -> None:
    model, _ = LAYOUTS[name]
    plain, decayed = results_of(name)[PLAIN].state, results_of(name)[DECAYED].state
    for parameter in parameter_shapes(model):
        first = initial_value(parameter, model, make_run(model).train.seed)
        difference = plain[f"weight/{parameter}"] - decayed[f"weight/{parameter}"]
        if is_decayed(parameter):
            assert distance(difference, DECAYED.lr * DECAYED.weight_decay * first) < 1e-3, parameter
        else:
            assert parameter == EMBEDDING or parameter.endswith("norm.weight")
            assert not bool(difference.any()), parameter


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("ZeRO 0, tensor", "ZeRO 1, tied stages")))
def test_gradients_are_scaled_down_to_the_limit_by_the_true_norm(name: str) -> None:
    """Seen in the first moment, which is (1 - beta1) times the clipped gradient; AdamW's step would hide the scale."""
    model, _ = LAYOUTS[name]
    run = make_run(model)
    expected = Oracle(run).take_step(batch_of(run, 0))
    for optimizer in (PLAIN, CLIPPED, WITHIN):
        result, limit = results_of(name)[optimizer], optimizer.clip_norm
        coefficient = min(1.0, limit / expected.grad_norm) if limit else 1.0
        for (step,) in result.by_rank:
            assert step.update.is_applied
            assert step.update.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance.LAYOUT_GRAD_NORM)
            # Room for the 1e-6 that DeepSpeed and torch add to the norm.
            assert step.update.clip_coefficient == pytest.approx(coefficient, rel=5e-6)
        scale = (1 - optimizer.beta1) * coefficient
        clipped = {parameter: gradient * scale for parameter, gradient in expected.gradients.items()}
        assert_close(of_kind("exp_avg", result.state), clipped, 2 * tolerance.LAYOUT_GRADIENT)


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("ZeRO 0, tensor", "ZeRO 1, tied stages")))
def test_weights_after_clipped_and_decayed_steps_are_torchs_own(name: str) -> None:
    model, _ = LAYOUTS[name]
    run, result = make_run(model, optimizer=TRAINED), results_of(name)[TRAINED]
    oracle = Oracle(run)
    expected = [oracle.take_step(batch_of(run, number)) for number in range(NUM_STEPS[TRAINED])]
    for steps in result.by_rank:
        for step, before in zip(steps, expected, strict=True):
            assert abs(step.loss - before.loss) < tolerance.LAYOUT_LOSS
    weights = of_kind("weight", result.state)
    for parameter, weight in oracle.weights().items():
        assert float((weights[parameter] - weight).abs().max()) < tolerance.LAYOUT_WEIGHTS, parameter


def learning_rates(ranks: Ranks) -> list[Tensor]:
    """How far one weight moves in steps of different learning rates."""
    run = make_run(optimizer=PLAIN)
    engine = build_engine(run, start(run), find_platform())
    moves = []
    for lr in (0.0, 1e-3, 1e-2):
        before = whole([copies(engine.state_fragments())])["weight/lm_head.weight"]
        take_step(engine, batch_of(run, 0), lr)
        moves.append((whole([copies(engine.state_fragments())])["weight/lm_head.weight"] - before).abs().max())
    return moves


def test_each_step_uses_the_learning_rate_it_is_given() -> None:
    at_rest, slow, fast = run_ranks(learning_rates, 1)[0]
    assert float(at_rest) == 0
    # Near the start a step of AdamW is at most a little more than lr.
    assert 0.5e-3 < float(slow) < 1.5e-3 and 0.5e-2 < float(fast) < 1.5e-2


def gradients_left(ranks: Ranks, zero: int, precision: str) -> int:
    """Gradients that a step leaves behind."""
    run = make_run(parallel=ParallelConfig(data=2, zero=zero), precision=precision)
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    take_step(engine, batch_of(run, 0, groups))
    left = [item.parameter.grad for item in engine.local_parameters]
    return sum(gradient is not None and bool(gradient.any()) for gradient in left)


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_a_step_leaves_no_gradient_behind(zero: int, precision: str) -> None:
    assert run_ranks(gradients_left, 2, zero=zero, precision=precision) == [0, 0]
