"""Recomputation saves memory and nothing else: the same bits, and what routers did is counted once."""

from dataclasses import replace

import pytest
import torch
from layouts import RESIDUAL, Step, batch_of, in_tiers, make_run, of_kind, start, take_step, whole
from ranks import run_ranks

from megagrok.config.schema import ModelConfig, ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

PER_MICRO_BATCH = replace(RESIDUAL, moe=replace(RESIDUAL.moe, balance_loss="micro_batch"))
LAYOUTS = {
    "one rank": (RESIDUAL, ParallelConfig()),
    "tensor and sequence": (PER_MICRO_BATCH, ParallelConfig(tensor=2, sequence=True)),
    "tensor": (RESIDUAL, ParallelConfig(tensor=2)),
    "experts": (RESIDUAL, ParallelConfig(data=2, expert=2)),
    "stages": (RESIDUAL, ParallelConfig(pipeline=2)),
    "context": (RESIDUAL, ParallelConfig(context=2)),
}


def steps_with(
    ranks: Ranks, model: ModelConfig, parallel: ParallelConfig, settings: list[dict[str, object]]
) -> list[list[Step]]:
    """Two steps of an engine for each of `settings`."""
    groups = start(make_run(model, parallel))
    results = []
    for changed in settings:
        run = make_run(model, parallel, **changed)
        engine = build_engine(run, groups, find_platform())
        results.append([take_step(engine, batch_of(run, step, groups)) for step in range(2)])
    return results


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("tensor", "stages", "context")))
def test_recomputed_gradients_have_the_same_bits_and_routing_counts_once(name: str) -> None:
    model, parallel = LAYOUTS[name]
    settings: list[dict[str, object]] = [{"recompute": kind} for kind in ("none", "selective", "full")]
    settings.append({"recompute": "full", "deterministic": True})
    by_rank = run_ranks(steps_with, world_size(parallel), model=model, parallel=parallel, settings=settings)
    for number in range(2):
        kept, *recomputed = ([steps[kind][number] for steps in by_rank] for kind in range(len(settings)))
        expected = whole(step.gradients for step in kept)
        for ranks in recomputed:
            actual = whole(step.gradients for step in ranks)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
            for step, before in zip(ranks, kept, strict=True):
                assert torch.equal(step.totals.tokens_per_expert_LE, before.totals.tokens_per_expert_LE)
                assert step.totals.ce_sum == before.totals.ce_sum
                assert step.totals.balance_sum == before.totals.balance_sum
                assert step.totals.z_sum == before.totals.z_sum
                assert step.update == before.update
        choices = model.moe.top_k * kept[0].totals.num_tokens
        assert kept[0].totals.tokens_per_expert_LE.sum(1).tolist() == [choices] * model.num_layers
        assert of_kind("gradient", expected)


def count_forwards(ranks: Ranks) -> dict[str, tuple[int, int]]:
    """How often one layer's router and its core attention run in a step of four micro-batches."""
    counts = {}
    groups = start(make_run())
    for kind in ("none", "selective", "full"):
        run = make_run(recompute=kind)
        engine = build_engine(run, groups, find_platform())
        layer = engine._chunks[0].decoder.layers[0]
        called: list[str] = []
        layer.mlp.router.register_forward_hook(lambda *_, called=called: called.append("router"))
        layer.self_attention.core_attention.register_forward_hook(lambda *_, called=called: called.append("attention"))
        engine.forward_backward(batch_of(run, 0, groups))
        counts[kind] = (called.count("router"), called.count("attention"))
    return counts


def test_recomputation_really_happens() -> None:
    """Selective runs the core attention a second time, full the whole layer."""
    assert run_ranks(count_forwards, 1) == [{"none": (4, 4), "selective": (4, 8), "full": (8, 8)}]
