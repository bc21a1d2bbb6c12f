"""The plan says what the real code does: FLOPs, messages and bytes of ranks of all kinds of layouts, on fake peers.

Within 3 % for FLOPs, messages and state, 10 % for the activation peak (megagrok/rehearse/against_plan.py).
"""

from dataclasses import replace
from pathlib import Path

import pytest
from layouts import MODEL, make_run

from megagrok.config import decode_config
from megagrok.config.schema import ParallelConfig, RunConfig
from megagrok.plan import world_size
from megagrok.rehearse import Rehearsal, rehearse
from megagrok.rehearse.against_plan import against_plan

# Large enough that norms and counts, which the plan leaves out, weigh nothing; fake, so that it costs nothing.
WIDE = replace(
    MODEL,
    vocab_size=2048,
    hidden=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_positions=1024,
    moe=replace(MODEL.moe, num_experts=8, ffn_hidden=384, residual_ffn_hidden=512),
)
FULL_SIZE = Path(__file__).parents[2] / "configs/run/pretrain-286b.yaml"


def wide_run(parallel: ParallelConfig, **train: object) -> RunConfig:
    """16 micro-batches of two samples of 512 tokens for each replica."""
    size: dict[str, object] = {"seq_len": 512, "global_batch": 32 * parallel.data, "micro_batch": 2}
    samples = {"evaluate_samples": 8 * parallel.data, "precision": "bf16"}
    return make_run(WIDE, parallel, **(size | samples | train))


EVERYTHING = ParallelConfig(tensor=2, sequence=True, data=2, expert=4, pipeline=2, virtual_pipeline=2)
RUNS = {
    "alone": wide_run(ParallelConfig()),
    "fp32, no ZeRO": wide_run(ParallelConfig(data=2, zero=0), precision="fp32"),
    "fp32, ZeRO 2": wide_run(ParallelConfig(data=2, zero=2), precision="fp32"),
    "tensor": wide_run(ParallelConfig(tensor=2)),
    "tensor and sequence": wide_run(ParallelConfig(tensor=2, sequence=True)),
    "experts": wide_run(ParallelConfig(data=2, expert=2)),
    "context": wide_run(ParallelConfig(context=2)),
    "pipeline": wide_run(ParallelConfig(pipeline=4), recompute="full"),
    "interleaved": wide_run(ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "everything": wide_run(EVERYTHING, recompute="selective"),
}
# One run whose ranks meet every kind of message but those of context ranks, and one that has these.
QUICK = {"context": [0], "everything": [0, 7]}
SLOW = [(name, rank) for name, run in RUNS.items() for rank in range(world_size(run.parallel))]


def assert_planned(run: RunConfig, found: Rehearsal) -> None:
    rows = against_plan(run, found)
    assert {"forward FLOPs", "backward FLOPs", "activation peak"} <= {row.name for row in rows}
    off = [f"{row.name}: {row.counted:.6g} counted, {row.planned:.6g} planned" for row in rows if not row.holds]
    assert not off, "\n".join(off)


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, ranks in QUICK.items() for rank in ranks])
def test_the_plan_of_a_rank_is_what_its_code_does(name: str, rank: int) -> None:
    assert_planned(RUNS[name], rehearse(RUNS[name], rank))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), SLOW)
def test_the_plan_of_every_rank_is_what_its_code_does(name: str, rank: int) -> None:
    assert_planned(RUNS[name], rehearse(RUNS[name], rank))


def test_the_plan_of_the_last_stage_of_the_full_size_job_is_what_its_code_does() -> None:
    run = decode_config(FULL_SIZE, ["parallel.virtual_pipeline=1"]).config
    found = rehearse(run, 511)
    assert found.peak.total > 32 * 2**30
    assert_planned(run, found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(8))
@pytest.mark.parametrize("settings", [[], ["parallel.data=64"]], ids=["512 ranks", "1,024 ranks"])
def test_the_plan_of_every_stage_of_the_full_size_job_is_what_its_code_does(settings: list[str], stage: int) -> None:
    run = decode_config(FULL_SIZE, settings).config
    assert_planned(run, rehearse(run, stage * world_size(run.parallel) // 8 + stage))


@pytest.mark.slow
def test_fp8_is_walked_in_bf16_and_says_so() -> None:
    run = wide_run(EVERYTHING, precision="fp8", recompute="selective")
    found = rehearse(run, 3)
    assert any(sentence.startswith("fp8: Megatron's linears in bf16") for sentence in found.replaced)
    assert_planned(run, found)
