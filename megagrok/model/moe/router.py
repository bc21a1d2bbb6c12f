"""Which experts a token visits, with which weights, and what the router is charged for it."""

# T this rank's tokens, E experts, K top-k, D hidden

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrok.model.loss import balance_loss_sum
from megagrok.model.transformer_config import GrokTransformerConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """One call's decisions. Losses are sums over this rank's tokens and carry gradients."""

    weights_TK: Tensor
    experts_TK: Tensor
    tokens_per_expert_E: Tensor
    balance_sum: Tensor
    z_sum: Tensor


class Router(nn.Module):
    """softmax over all experts of the soft-capped logits, then the top K, in fp32.

    Every rank routes its own tokens (tensor ranks hold different ones), so the weight's gradient is a part of the
    whole; the tag `sequence_parallel` asks the engine to sum it over the tensor ranks.
    """

    load_E: Tensor

    def __init__(self, config: GrokTransformerConfig) -> None:
        super().__init__()
        self.moe = config.grok.moe
        self.route = config.kernels.router
        self.micro_batch_group = config.groups.tensor_context
        num_experts = self.moe.num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]
        self.register_buffer("load_E", torch.full((num_experts,), 1 / num_experts, dtype=torch.float64))

    def forward(self, x_TD: Tensor) -> Routing:
        moe = self.moe
        routed = self.route(
            x_TD,
            self.weight,
            cap=moe.router_softcap,
            top_k=moe.top_k,
            scores="softmax",
            renormalize=moe.renormalize_top_k,
        )
        counts_E = self._micro_batch_counts(routed.tokens_per_expert_E)
        balance_sum = balance_loss_sum(moe.balance_loss, routed.probability_sum_E, counts_E, self.load_E)
        return Routing(routed.weights_TK, routed.experts_TK, routed.tokens_per_expert_E, balance_sum, routed.z_sum)

    def _micro_batch_counts(self, tokens_per_expert_E: Tensor) -> Tensor:
        """Counts over all ranks that share this micro-batch, if the balance loss is measured over it."""
        if self.moe.balance_loss != "micro_batch" or dist.get_world_size(self.micro_batch_group) == 1:
            return tokens_per_expert_E
        counts_E = tokens_per_expert_E.clone()
        dist.all_reduce(counts_E, group=self.micro_batch_group)
        return counts_E
