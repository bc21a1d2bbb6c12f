"""The MoE layer is the reference's, also when routing is as lopsided as it can be and a rank has nothing to do."""

# T tokens, D hidden, E experts

from dataclasses import dataclass, replace

import pytest
import tolerance
import torch
from deepspeed.moe.layer import MoE
from layouts import MODEL, assert_close, make_run, start
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import ModelConfig, ParallelConfig, RunConfig
from megagrok.model.init import initial_value
from megagrok.model.moe.layer import GrokMoE
from megagrok.model.reference import SparseMoE
from megagrok.model.transformer_config import make_transformer_config
from megagrok.parallel.groups import ProcessGroups
from megagrok.parallel.ranks import Ranks
from megagrok.platform import find_platform

PREFIX = "model.layers.0.block_sparse_moe"
SPREAD = ParallelConfig(data=2, expert=2)
LOADS = ("as the weights have it", "an expert with no token", "one rank's experts take all", "no token on one rank")
ONE_CHOICE = replace(MODEL, moe=replace(MODEL.moe, top_k=1))


@dataclass(frozen=True, slots=True)
class Result:
    """One rank's outputs, and the gradients it holds by global name (its experts', and its part of the gate's)."""

    y_TD: Tensor
    x_grad_TD: Tensor
    gradients: dict[str, Tensor]
    tokens_per_expert_E: Tensor


def gate_of(model: ModelConfig, load: str) -> Tensor:
    """Router weights that bring about the load. Inputs have a mean of 1, so a row's sum decides."""
    gate_ED = initial_value(f"{PREFIX}.gate.weight", model, 0)
    if load == "an expert with no token":
        gate_ED[1] -= 0.3
    if load == "one rank's experts take all":
        gate_ED[2] += 0.4
        gate_ED[3] += 0.3
    return gate_ED


def input_of(rank: int, model: ModelConfig, load: str) -> Tensor:
    num_tokens = 0 if load == "no token on one rank" and rank == 1 else 9 + 4 * rank
    stream = torch.Generator().manual_seed(rank)
    return 1 + torch.randn(num_tokens, model.hidden, generator=stream) / 4


def weight_of(y_TD: Tensor) -> Tensor:
    """What the loss makes of each output."""
    return torch.arange(y_TD.numel()).view_as(y_TD).sin()


def one_layer(run: RunConfig, groups: ProcessGroups, load: str) -> Result:
    model = run.model
    layer = GrokMoE(make_transformer_config(run, groups, find_platform()))
    rank, local = groups.coordinates.expert, layer.num_local_experts
    names = {}
    with torch.no_grad():
        layer.router.weight.copy_(gate_of(model, load))
        for number in range(local):
            expert = f"{PREFIX}.experts.{rank * local + number}"
            gate, up = layer.experts.gate_up_eFD[number].chunk(2)
            for name, block in (("w1", gate), ("w3", up), ("w2", layer.experts.down_eDF[number])):
                block.copy_(initial_value(f"{expert}.{name}.weight", model, 0))
    x_sbD = input_of(groups.coordinates.data, model, load)[:, None, :].requires_grad_()
    y_sbD, _ = layer(x_sbD)
    (y_sbD * weight_of(y_sbD)).sum().backward()
    for number in range(local):
        gate, up = layer.experts.gate_up_eFD.grad[number].chunk(2)
        names |= {
            f"experts.{rank * local + number}.w1.weight": gate,
            f"experts.{rank * local + number}.w3.weight": up,
            f"experts.{rank * local + number}.w2.weight": layer.experts.down_eDF.grad[number],
        }
    return Result(
        y_sbD.detach()[:, 0],
        x_sbD.grad[:, 0],
        {"gate.weight": layer.router.weight.grad, **names},
        layer.take_totals().tokens_per_expert_E,
    )


def layers(ranks: Ranks, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Result]:
    run = make_run(model, parallel)
    groups = start(run)
    return {load: one_layer(run, groups, load) for load in LOADS}


@pytest.mark.parametrize("model", [MODEL, ONE_CHOICE], ids=["two choices", "one choice"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), SPREAD], ids=["one rank", "two ranks"])
def test_outputs_and_gradients_are_the_references_whatever_the_load(
    model: ModelConfig, parallel: ParallelConfig
) -> None:
    size = parallel.data
    by_rank = run_ranks(layers, size, model=model, parallel=parallel)
    for load in LOADS:
        results = [result[load] for result in by_rank]
        reference = SparseMoE(model.hidden, model.moe)
        names = dict(reference.named_parameters())
        values = {name: initial_value(f"{PREFIX}.{name}", model, 0) for name in names}
        reference.load_state_dict(values | {"gate.weight": gate_of(model, load)})
        inputs = [input_of(rank, model, load).requires_grad_() for rank in range(size)]
        outputs = [reference(x_TD, None) for x_TD in inputs]
        moe = model.moe
        loss = sum(
            (y_TD * weight_of(y_TD.detach())).sum()
            + moe.balance_coefficient * routing.balance_sum
            + moe.z_loss_coefficient * routing.z_sum
            for y_TD, routing in outputs
        )
        torch.autograd.backward(loss)
        for rank, (result, x_TD, (y_TD, routing)) in enumerate(zip(results, inputs, outputs, strict=True)):
            assert_close(
                {f"y {rank}": result.y_TD, f"x {rank}": result.x_grad_TD},
                {f"y {rank}": y_TD.detach(), f"x {rank}": x_TD.grad},
                tolerance.LAYOUT_GRADIENT,
            )
            assert torch.equal(result.tokens_per_expert_E, routing.tokens_per_expert_E)
        totals_E = torch.stack([result.tokens_per_expert_E for result in results]).sum(0)
        assert int(totals_E.sum()) == model.moe.top_k * sum(len(x_TD) for x_TD in inputs)
        check_load(load, totals_E, model)
        gradients = {"gate.weight": torch.stack([result.gradients["gate.weight"] for result in results]).sum(0)}
        for result in results:
            gradients |= {name: value for name, value in result.gradients.items() if name != "gate.weight"}
        # An expert that no token visits has no gradient in the reference, and zeros here.
        expected = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in names.items()}
        assert_close(gradients, expected, tolerance.LAYOUT_GRADIENT)


def check_load(load: str, totals_E: Tensor, model: ModelConfig) -> None:
    """The gate brings about what the test is named for."""
    if load == "an expert with no token":
        assert int(totals_E[1]) == 0
    if load == "one rank's experts take all":
        assert totals_E.nonzero().flatten().tolist() == [2, 3][: model.moe.top_k]


def contract(ranks: Ranks) -> dict[str, object]:
    run = make_run(parallel=SPREAD)
    layer = GrokMoE(make_transformer_config(run, start(run), find_platform()))
    return {
        "is a MoE": isinstance(layer, MoE),
        "experts": (layer.num_experts, layer.num_local_experts, layer.expert_group_name),
        "tagged": [(weight.allreduce, weight.group_name) for weight in layer.experts.parameters()],
        "router untagged": "allreduce" not in vars(layer.router.weight),
    }


def test_deepspeed_recognises_the_layer_and_its_experts() -> None:
    assert run_ranks(contract, 2)[0] == {
        "is a MoE": True,
        "experts": (4, 2, "ep_size_2"),
        "tagged": [(False, "ep_size_2")] * 2,
        "router untagged": True,
    }
