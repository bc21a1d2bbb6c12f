"""Bytes per rank: what the ranks hold adds up to the model, and ZeRO divides what it says it divides."""

import dataclasses
from pathlib import Path

import pytest

from megagrok.config import ModelConfig, ParallelConfig, load_config, load_model_config
from megagrok.plan import check, describe_run, params_by_part, state_bytes, total_params, with_setting
from megagrok.plan.memory import stage_params
from megagrok.plan.memory_rules import sure_bytes
from megagrok.plan.shape import MEGAGROK, Layout, Shape
from megagrok.plan.stage_memory import stage_memory

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(params=["grok2-286b", "grok2-270b", "grok1-314b"])
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return load_model_config(CONFIGS / "model" / f"{request.param}.yaml")


def test_one_rank_holds_everything(model: ModelConfig) -> None:
    (alone,) = state_bytes(model, ParallelConfig(zero=0), "fp32")
    assert (alone.weights, alone.gradients, alone.optimizer) == tuple(n * total_params(model) for n in (4, 4, 8))
    assert alone.total == 16 * total_params(model)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline=8),
        ParallelConfig(tensor=8, sequence=True),
        ParallelConfig(tensor=4, sequence=True, pipeline=2, expert=4),
    ],
    ids=["pipeline", "tensor", "tensor-pipeline-expert"],
)
def test_the_ranks_together_hold_the_model_once_and_the_copies_that_layouts_make(
    model: ModelConfig, parallel: ParallelConfig
) -> None:
    stages = [stage_params(model, parallel, stage) for stage in range(parallel.pipeline)]
    parts = params_by_part(model)
    experts = sum(stage.expert for stage in stages) * parallel.tensor
    assert experts == parts["experts"] * parallel.tensor // parallel.expert
    copied = (parts["router"] + parts["norms"]) * (parallel.tensor - 1)
    head = parts["embedding"] if model.tied_embeddings and parallel.pipeline > 1 else 0
    dense = sum(stage.dense for stage in stages) * parallel.tensor
    assert dense == total_params(model) - parts["experts"] + copied + head


def test_zero_shards_the_optimizer_and_no_stage_the_gradients_that_accumulate(model: ModelConfig) -> None:
    layout = ParallelConfig(tensor=8, sequence=True, expert=8, data=8)
    whole, one, two = (state_bytes(model, dataclasses.replace(layout, zero=zero), "bf16")[0] for zero in (0, 1, 2))
    assert whole.weights == one.weights == two.weights
    assert whole.gradients == one.gradients == two.gradients == 2 * one.weights
    # Experts have tensor * data / expert = 8 copies, dense weights data = 8: an eighth of each.
    assert one.optimizer == pytest.approx(whole.optimizer / 8)
    assert two.optimizer == one.optimizer


def test_the_pretraining_recipe_fits_its_gpus_and_its_tokens() -> None:
    config = load_config(CONFIGS / "run" / "pretrain-286b.yaml").config
    description = describe_run(config)
    assert description.world_size == 512
    assert description.total_tokens == pytest.approx(15e12, rel=1e-5)
    assert max(stage.total for stage in description.rank_bytes) < 40 * 2**30
    assert config.schedule.decay_steps * config.train.global_batch * config.train.seq_len == pytest.approx(
        0.32 * 15e12, rel=1e-3
    )


def test_a_run_is_refused_exactly_where_its_state_and_what_its_layers_keep_outgrow_the_device() -> None:
    config = load_config(CONFIGS / "run" / "pretrain-286b.yaml").config
    stages = stage_memory(Shape.of(config.model), Layout.of(config), MEGAGROK)
    fullest = max(map(sure_bytes, stages))
    assert fullest > max(stage.total for stage in describe_run(config).rank_bytes)
    assert check(config, memory_bytes=fullest) == []
    (problem,) = check(config, memory_bytes=fullest - 1)
    assert problem.text.startswith("a rank of stage 0 holds") and "before its first backward pass" in problem.text
    assert problem.fixes
    for fix in problem.fixes:
        assert check(with_setting(config, fix.key, fix.value), memory_bytes=fullest - 1) == []


def test_a_run_that_its_state_alone_would_let_pass_is_refused_for_what_its_layers_keep() -> None:
    config = load_config(CONFIGS / "run" / "pretrain-286b.yaml").config
    state = max(stage.total for stage in describe_run(config).rank_bytes)
    (problem,) = check(config, memory_bytes=3 * state // 2)
    assert "Largest: activations" in problem.text
    assert any(fix.key == "train.recompute" for fix in problem.fixes)


def test_memory_is_looked_at_only_if_the_layout_can_be() -> None:
    config = load_config(CONFIGS / "run" / "pretrain-286b.yaml").config
    (problem,) = check(with_setting(config, "model.num_layers", 61), memory_bytes=1)
    assert problem.key == "model.num_layers"
