"""The MoE layer: DeepSpeed's MoE contract on the outside, Megatron's mlp slot on the inside."""

# s this rank's positions, b micro-batch, T = s * b tokens, D hidden

import math
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megagrok.model.moe.dispatch import combine, dispatch
from megagrok.model.moe.experts import Experts
from megagrok.model.moe.router import Router, Routing
from megagrok.model.transformer_config import GrokTransformerConfig
from megagrok.parallel.groups import expert_group_name


@dataclass(slots=True)
class RouterTotals:
    """Sums over the micro-batches of a step and this rank's tokens, on the device; `take` empties them."""

    tokens_per_expert_E: Tensor
    balance_sum: Tensor
    z_sum: Tensor

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> "RouterTotals":
        """Nothing routed yet."""
        scalar = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros(num_experts, dtype=torch.int64, device=device), scalar, scalar.clone())

    def add(self, routing: Routing) -> None:
        """Count one call."""
        self.tokens_per_expert_E += routing.tokens_per_expert_E
        self.balance_sum += routing.balance_sum.detach()
        self.z_sum += routing.z_sum.detach()


class GrokMoE(MoE):
    """Route, dispatch, compute, combine; beside it the dense residual MLP if the model has one.

    It is a DeepSpeed `MoE` because the engine recognises the layer by that type (deepspeed 0.19.8 engine.py:2103), and
    none of the stock layer's parts, whose dispatch pads every expert to the fullest.
    """

    def __init__(self, config: GrokTransformerConfig, **_slot: Any) -> None:
        nn.Module.__init__(self)
        self.moe = config.grok.moe
        self.num_experts = self.moe.num_experts
        self.num_local_experts = self.num_experts // config.expert_model_parallel_size
        self.expert_group_name = expert_group_name(config.expert_model_parallel_size)
        self.groups = config.groups
        self.permute = config.kernels.permute
        # Without sequence parallelism the tensor ranks hold the same tokens; each then takes an equal part of them.
        self.tokens_are_replicated = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        self.router = Router(config)
        self.experts = Experts(config)
        self.residual = None if self.moe.residual_ffn_hidden is None else _make_residual_mlp(config)
        self.totals: RouterTotals | None = None

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's hook to hand out groups; ours come from `parallel.groups`, which proved them equal."""

    def forward(self, x_sbD: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        """Collective over the expert ranks (and the tensor ranks). Returns ([s, b, D], no bias), as Megatron's MLP."""
        y_sbD = self._mix_experts(x_sbD)
        if self.residual is not None:
            y_sbD = (y_sbD + self.residual(x_sbD)[0]) / math.sqrt(2)
        return y_sbD, None

    def take_totals(self) -> RouterTotals:
        """What was routed since the last call."""
        totals, self.totals = self.totals, None
        return totals or RouterTotals.zeros(self.num_experts, self.router.weight.device)

    def _mix_experts(self, x_sbD: Tensor) -> Tensor:
        if self.tokens_are_replicated:
            x_sbD = scatter_to_sequence_parallel_region(x_sbD, group=self.groups.tensor)
        x_TD = x_sbD.flatten(0, 1)
        routing = self.router(x_TD)
        weights_TK = self._charge(routing) if torch.is_grad_enabled() else routing.weights_TK
        group = self.groups.expert
        dispatched = dispatch(x_TD, routing.experts_TK, weights_TK, routing.tokens_per_expert_E, group, self.permute)
        y_sbD = combine(self.experts(dispatched), dispatched, group, self.permute).view_as(x_sbD)
        if self.tokens_are_replicated:
            y_sbD = gather_from_sequence_parallel_region(
                y_sbD, tensor_parallel_output_grad=False, group=self.groups.tensor
            )
        return y_sbD

    def _charge(self, routing: Routing) -> Tensor:
        """Count the call and attach the auxiliary losses to the weights' gradient.

        Only with gradients enabled: recomputation runs the forward pass twice, and once of it without.
        """
        if self.totals is None:
            self.totals = RouterTotals.zeros(self.num_experts, routing.weights_TK.device)
        self.totals.add(routing)
        charge = self.moe.balance_coefficient * routing.balance_sum + self.moe.z_loss_coefficient * routing.z_sum
        charged: Tensor = MoEAuxLossAutoScaler.apply(routing.weights_TK, charge)
        return charged


def _make_residual_mlp(config: GrokTransformerConfig) -> MLP:
    """Megatron's own gated MLP, split over the tensor ranks."""
    return MLP(
        config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ffn_hidden_size=config.grok.moe.residual_ffn_hidden,
        tp_group=config.groups.tensor,
    )
