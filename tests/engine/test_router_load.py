"""The balance loss of a step knows the load of the step before it, over the whole batch, the same on every rank."""

from dataclasses import replace

import pytest
import tolerance
import torch
from layouts import MODEL, Oracle, Step, batch_of, copies, in_tiers, make_run, of_kind, start, take_step, whole
from ranks import run_ranks
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.config.schema import ModelConfig, ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.model.loss import expert_load
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

# A coefficient so large that a wrong load shows in the gradients.
HEAVY = replace(MODEL, moe=replace(MODEL.moe, balance_coefficient=1.0))
DEEP = replace(HEAVY, num_layers=4)
LAYOUTS = {
    "experts": (HEAVY, ParallelConfig(data=2, expert=2)),
    "tensor": (HEAVY, ParallelConfig(tensor=2)),
    "tensor and sequence": (HEAVY, ParallelConfig(tensor=2, sequence=True)),
    "interleaved": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "context, ZeRO 0": (HEAVY, ParallelConfig(context=2, zero=0)),
}


def loads_and_steps(
    ranks: Ranks, model: ModelConfig, parallel: ParallelConfig
) -> tuple[list[Step], list[dict[int, Tensor]], list[Fragment]]:
    """Three steps; before each, the load that this rank's routers hold; and the state that it would save at the end."""
    run = make_run(model, parallel)
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    steps, held = [], []
    for number in range(3):
        layers = [layer for chunk in engine._chunks for layer in chunk.decoder.layers]
        held.append({layer.layer_number - 1: layer.mlp.router.load_E.clone() for layer in layers})
        steps.append(take_step(engine, batch_of(run, number, groups)))
    return steps, held, copies(engine.state_fragments())


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("tensor", "context, ZeRO 0")))
def test_routers_hold_the_previous_steps_load_on_every_rank(name: str) -> None:
    model, parallel = LAYOUTS[name]
    run = make_run(model, parallel)
    oracle = Oracle(run)
    expected = [oracle.take_step(batch_of(run, number)) for number in range(3)]
    uniform_E = torch.full((model.moe.num_experts,), 1 / model.moe.num_experts, dtype=torch.float64)
    loads: list[Tensor] = [uniform_E.expand(model.num_layers, -1)]
    loads += [expert_load(step.totals.tokens_per_expert_LE) for step in expected]
    by_rank = run_ranks(loads_and_steps, world_size(parallel), model=model, parallel=parallel)
    for steps, held, _ in by_rank:
        for number, (step, before) in enumerate(zip(steps, expected, strict=True)):
            assert torch.equal(step.totals.tokens_per_expert_LE, before.totals.tokens_per_expert_LE)
            assert step.totals.balance_sum == pytest.approx(before.totals.balance_sum, rel=1e-6)
            assert step.update.grad_norm == pytest.approx(before.grad_norm, rel=2 * tolerance.LAYOUT_GRAD_NORM)
            for layer, load_E in held[number].items():
                assert load_E.dtype == torch.float64
                assert torch.equal(load_E, loads[number][layer])
    saved = of_kind("router_load", whole(state for *_, state in by_rank))
    assert saved.keys() == {str(layer) for layer in range(model.num_layers)}
    assert all(torch.equal(load_E, loads[-1][int(layer)]) for layer, load_E in saved.items())


def test_the_load_matters_to_the_gradient() -> None:
    """The laws above could not be seen broken otherwise."""
    run = make_run(HEAVY)
    oracle, forgetful = Oracle(run), Oracle(run)
    oracle.take_step(batch_of(run, 0))
    forgetful.take_step(batch_of(run, 0))
    forgetful.load_LE = None
    assert oracle.take_step(batch_of(run, 1)).grad_norm != pytest.approx(
        forgetful.take_step(batch_of(run, 1)).grad_norm, rel=1e-3
    )
