"""Grok from Megatron's parts is the reference: logits, loss, statistics and every gradient, for every switch."""

from dataclasses import replace

import pytest
import tolerance
import torch
from layouts import (
    MODEL,
    RESIDUAL,
    TIED,
    VARIANTS,
    Oracle,
    Step,
    assert_close,
    batch_of,
    distance,
    make_run,
    of_kind,
    start,
    take_step,
    tokens_of,
    whole,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import ModelConfig, ParallelConfig, RunConfig
from megagrok.engine.engine import build_engine
from megagrok.engine.state import cut
from megagrok.model.attention import SoftcapAttention
from megagrok.model.grok import GrokModel
from megagrok.model.loss import IGNORED_LABEL, cross_entropy_sum
from megagrok.model.moe.layer import GrokMoE
from megagrok.model.norm import PostNormResidual, RMSNorm
from megagrok.model.parts import fill_initial_values, local_parameters
from megagrok.model.reference import make_reference, training_loss_sum
from megagrok.model.spec import GrokLayer
from megagrok.model.transformer_config import make_transformer_config
from megagrok.parallel.context import context_positions
from megagrok.parallel.ranks import Ranks
from megagrok.platform import find_platform

TENSOR = ParallelConfig(tensor=2, sequence=True)
PIPELINE = ParallelConfig(pipeline=2)
SPREAD_VARIANTS = [
    ("residual MLP and temperature", RESIDUAL, TENSOR),
    ("balance over a micro-batch", VARIANTS["balance over a micro-batch"], TENSOR),
    ("tied", TIED, TENSOR),
    ("residual MLP and temperature", RESIDUAL, ParallelConfig(tensor=2)),
    ("balance over a micro-batch", VARIANTS["balance over a micro-batch"], ParallelConfig(tensor=2)),
    ("tied", TIED, PIPELINE),
    ("residual MLP and temperature", RESIDUAL, PIPELINE),
    ("balance over a micro-batch", VARIANTS["balance over a micro-batch"], ParallelConfig(context=2)),
    ("residual MLP and temperature", RESIDUAL, ParallelConfig(context=2)),
]


def labelled(run: RunConfig) -> tuple[Tensor, Tensor]:
    """Tokens and labels, of which some do not count."""
    tokens_BS, labels_BS = tokens_of(run, step=0)
    labels_BS[0, :5] = IGNORED_LABEL
    return tokens_BS, labels_BS


def models_on_one_rank(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Logits, the sum of the losses, expert counts and gradients of every variant, without any engine."""
    groups = start(make_run())
    results = {}
    for name, model in VARIANTS.items():
        run = make_run(model)
        chunk = GrokModel(make_transformer_config(run, groups, find_platform()), pre_process=True, post_process=True)
        parameters = local_parameters(chunk)
        fill_initial_values(parameters, model, run.train.seed)
        tokens_BS, labels_BS = labelled(run)
        positions_S = context_positions(run.train.seq_len, 0, 1)
        with torch.no_grad():
            logits_BSV = chunk(tokens_BS, None, positions_S).transpose(0, 1)
        loss_sum = chunk(tokens_BS, labels_BS, positions_S)
        loss_sum.backward()
        gradients = whole(
            cut("gradient", item, 0, item.parameter.numel(), item.parameter.grad.flatten(), model)
            for item in parameters
        )
        taken = [layer.take_totals() for layer in chunk.moe_layers]
        results[name] = {
            "logits": logits_BSV,
            "loss": loss_sum.detach(),
            "counts": torch.stack([totals.tokens_per_expert_E for totals in taken]),
            "router sums": torch.stack([torch.stack([totals.balance_sum for totals in taken]).sum(),
                                        torch.stack([totals.z_sum for totals in taken]).sum()]),
            **of_kind("gradient", gradients),
        }  # fmt: skip
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return run_ranks(models_on_one_rank, 1)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_one_rank_computes_what_the_reference_computes(name: str, alone: dict[str, dict[str, Tensor]]) -> None:
    model, computed = VARIANTS[name], dict(alone[name])
    run = make_run(model)
    tokens_BS, labels_BS = labelled(run)
    reference = make_reference(model, run.train.seed)
    output = reference(tokens_BS)
    training_loss_sum(output, labels_BS, model).backward()
    assert distance(computed.pop("logits"), output.logits_BSV.detach()) < tolerance.LAYOUT_GRADIENT
    num_counted = int((labels_BS != IGNORED_LABEL).sum())
    expected = cross_entropy_sum(output.logits_BSV.detach(), labels_BS) / num_counted
    assert abs(float(computed.pop("loss") / num_counted - expected)) < tolerance.LAYOUT_LOSS
    assert torch.equal(computed.pop("counts"), output.tokens_per_expert_LE)
    router_sums = torch.stack([output.balance_sum, output.z_sum])
    assert torch.allclose(computed.pop("router sums").float(), router_sums.float(), rtol=1e-6, atol=0)
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    assert_close(computed, gradients, tolerance.LAYOUT_GRADIENT)


def one_step(ranks: Ranks, models: list[ModelConfig], parallel: ParallelConfig) -> list[Step]:
    """The first step of an engine for each model, on one layout."""
    groups = start(make_run(models[0], parallel))
    steps = []
    for model in models:
        run = make_run(model, parallel)
        steps.append(take_step(build_engine(run, groups, find_platform()), batch_of(run, 0, groups)))
    return steps


@pytest.mark.parametrize("parallel", list(dict.fromkeys(parallel for *_, parallel in SPREAD_VARIANTS)), ids=repr)
def test_special_parts_survive_being_spread(parallel: ParallelConfig) -> None:
    """The residual MLP over tensor ranks, the tied embedding's copy on the last stage, counts over a micro-batch."""
    models = [model for _, model, wanted in SPREAD_VARIANTS if wanted == parallel]
    world_size = parallel.tensor * parallel.pipeline * parallel.context
    by_rank = run_ranks(one_step, world_size, models=models, parallel=parallel)
    for number, model in enumerate(models):
        run = make_run(model, parallel)
        expected = Oracle(run).take_step(batch_of(run, 0))
        steps = [steps[number] for steps in by_rank]
        assert abs(steps[0].loss - expected.loss) < tolerance.LAYOUT_LOSS
        assert steps[0].totals.balance_sum == pytest.approx(expected.totals.balance_sum, rel=1e-6)
        assert steps[0].totals.z_sum == pytest.approx(expected.totals.z_sum, rel=1e-6)
        gradients = of_kind("gradient", whole(step.gradients for step in steps))
        assert_close(gradients, expected.gradients, tolerance.LAYOUT_GRADIENT)
        for step in steps:
            assert step.update.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance.LAYOUT_GRAD_NORM)
            assert torch.equal(step.totals.tokens_per_expert_LE, expected.totals.tokens_per_expert_LE)


def names_of_slots(ranks: Ranks) -> dict[str, str]:
    """The class that stands in each slot of a layer."""
    run = make_run(RESIDUAL)
    config = make_transformer_config(run, start(run), find_platform())
    layer = GrokModel(config, pre_process=True, post_process=True).decoder.layers[0]
    slots = {
        "layer": layer,
        "input_layernorm": layer.input_layernorm,
        "self_attention": layer.self_attention,
        "core_attention": layer.self_attention.core_attention,
        "self_attn_bda": layer.self_attn_bda,
        "pre_mlp_layernorm": layer.pre_mlp_layernorm,
        "mlp": layer.mlp,
        "mlp_bda": layer.mlp_bda,
    }
    return {slot: type(module).__qualname__ for slot, module in slots.items()}


def test_what_is_not_grok_is_megatrons_own() -> None:
    """A layer is Megatron's, unpatched, told which tokens it has: only the slots of the table in model/spec.py hold
    ours."""
    assert issubclass(GrokLayer, TransformerLayer)
    assert run_ranks(names_of_slots, 1)[0] == {
        "layer": GrokLayer.__qualname__,
        "input_layernorm": RMSNorm.__qualname__,
        "self_attention": SelfAttention.__qualname__,
        "core_attention": SoftcapAttention.__qualname__,
        "self_attn_bda": PostNormResidual.__qualname__,
        "pre_mlp_layernorm": RMSNorm.__qualname__,
        "mlp": GrokMoE.__qualname__,
        "mlp_bda": PostNormResidual.__qualname__,
    }


def rotary_angles_far_out(ranks: Ranks) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at the last positions of a long context."""
    run = make_run(replace(MODEL, max_positions=1 << 17, rope_theta=208533496.0))
    config = make_transformer_config(run, start(run), find_platform())
    chunk = GrokModel(config, pre_process=True, post_process=True)
    angles = chunk._rotary_angles(torch.arange((1 << 17) - 4, 1 << 17))[:, 0, 0, :]
    return angles.cos(), angles.sin()


def test_rotary_angles_keep_their_precision_at_the_end_of_a_long_context() -> None:
    cos, sin = run_ranks(rotary_angles_far_out, 1)[0]
    exponent = torch.arange(0, MODEL.head_dim, 2, dtype=torch.float64) / MODEL.head_dim
    exact = torch.outer(torch.arange((1 << 17) - 4, 1 << 17).double(), 208533496.0**-exponent)
    # An angle in [0, 2 pi) is rounded once to fp32: half an ulp of 6.28, 2.4e-7.
    assert torch.allclose(cos.double(), torch.cat([exact, exact], -1).cos(), rtol=0, atol=4e-7)
    assert torch.allclose(sin.double(), torch.cat([exact, exact], -1).sin(), rtol=0, atol=4e-7)
