"""The plan's bytes are those of the real engine, walked on fake peers: state within 1 %, the activation peak within the
10 % that a plan promises (most are within 3 %)."""

from dataclasses import replace
from pathlib import Path

import pytest
from layouts import MODEL, in_tiers, make_run

from megagrok.config import load_config
from megagrok.config.schema import ModelConfig, ParallelConfig, Precision, Recompute, RunConfig
from megagrok.plan.shape import MEGAGROK, Layout, Shape
from megagrok.plan.stage_memory import stage_memory
from megagrok.rehearse import rehearse

STATE, ACTIVATIONS = 0.01, 0.10
ENGINE = replace(MEGAGROK, routing="balanced", on_cpu=True)
SMALL = replace(
    MODEL,
    num_layers=4,
    hidden=128,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=1024,
    max_positions=1024,
    moe=replace(MODEL.moe, num_experts=4, ffn_hidden=320, residual_ffn_hidden=None),
)
WITH_MLP = replace(SMALL, moe=replace(SMALL.moe, residual_ffn_hidden=256))


def run_of(
    parallel: ParallelConfig,
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    model: ModelConfig = SMALL,
    micro_batch: int = 1,
) -> RunConfig:
    run = make_run(model, parallel)
    global_batch = 8 * micro_batch * parallel.data
    train = replace(run.train, precision=precision, recompute=recompute, seq_len=512, micro_batch=micro_batch)
    return replace(run, train=replace(train, global_batch=global_batch))


P = ParallelConfig
RUNS = {
    "one rank": run_of(P()),
    "one rank, selective": run_of(P(), recompute="selective"),
    "one rank, full": run_of(P(), recompute="full"),
    "one rank, fp32": run_of(P(), "fp32"),
    "one rank, fp32, selective": run_of(P(), "fp32", "selective"),
    "one rank, fp32, full": run_of(P(), "fp32", "full"),
    "tensor": run_of(P(tensor=2)),
    "tensor, fp32": run_of(P(tensor=2), "fp32"),
    "sequence": run_of(P(tensor=2, sequence=True)),
    "sequence, selective": run_of(P(tensor=2, sequence=True), recompute="selective"),
    "sequence, full": run_of(P(tensor=2, sequence=True), recompute="full"),
    "stages": run_of(P(pipeline=4)),
    "stages, full": run_of(P(pipeline=4), recompute="full"),
    "interleaved": run_of(P(pipeline=2, virtual_pipeline=2)),
    "interleaved, selective": run_of(P(pipeline=2, virtual_pipeline=2), recompute="selective"),
    "experts": run_of(P(expert=4, data=4)),
    "experts, selective": run_of(P(expert=4, data=4), recompute="selective"),
    "context": run_of(P(context=2)),
    "context, selective": run_of(P(context=2), recompute="selective"),
    "residual MLP": run_of(P(), model=WITH_MLP),
    "residual MLP, sequence, fp32": run_of(P(tensor=2, sequence=True), "fp32", model=WITH_MLP),
    "data, ZeRO 2": run_of(P(data=2, zero=2), "fp32"),
    "data, ZeRO 0": run_of(P(data=2, zero=0), "fp32"),
    "all": run_of(P(tensor=2, sequence=True, pipeline=2, expert=4, data=2), recompute="selective", micro_batch=2),
}
QUICK = ("interleaved", "all")


@pytest.mark.parametrize("name", in_tiers(RUNS, slow=tuple(name for name in RUNS if name not in QUICK)))
def test_the_first_and_the_last_stage_hold_what_the_plan_says(name: str) -> None:
    stages = RUNS[name].parallel.pipeline
    for stage in sorted({0, stages - 1}):
        check_stage(RUNS[name], stage)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_stage_of_the_pretraining_run_holds_what_the_plan_says(recompute: Recompute) -> None:
    config = load_config(Path(__file__).parents[2] / "configs/run/pretrain-286b.yaml").config
    run = replace(config, train=replace(config.train, recompute=recompute))
    for stage in (0, 1, run.parallel.pipeline - 1):
        check_stage(run, stage)


def check_stage(run: RunConfig, stage: int) -> None:
    layout = Layout.of(run)
    planned = stage_memory(Shape.of(run.model), layout, ENGINE)[stage]
    found = rehearse(run, stage * (layout.world_size // layout.pipeline))
    counted = found.forward_backward
    assert planned.weights == pytest.approx(counted.weights, rel=STATE)
    assert planned.gradients == pytest.approx(counted.gradients, rel=STATE)
    assert planned.optimizer == pytest.approx(counted.optimizer, rel=STATE)
    working = counted.activations + counted.transient + counted.logits
    assert planned.activations + planned.transient + planned.logits == pytest.approx(working, rel=ACTIVATIONS)
    assert planned.allocated == pytest.approx(found.peak.total, rel=ACTIVATIONS)
