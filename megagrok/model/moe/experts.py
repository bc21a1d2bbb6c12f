"""This rank's experts: gated tanh-GELU MLPs on rows that they pick out of what was dispatched to them."""

# e experts of this rank, D hidden, F expert width

import torch
from torch import Tensor, nn

from megagrok.model.moe.dispatch import Dispatched
from megagrok.model.transformer_config import GrokTransformerConfig
from megagrok.parallel.groups import expert_group_name


class Experts(nn.Module):
    """down( gelu_tanh(gate(x)) * up(x) ), one set of weights per local expert, stacked.

    The tags are DeepSpeed's contract for expert parameters: `allreduce` False and `group_name` send the gradient to
    the expert-data group instead of the data group (deepspeed/moe/experts.py).
    """

    def __init__(self, config: GrokTransformerConfig) -> None:
        super().__init__()
        self.mix = config.kernels.experts
        moe, dtype = config.grok.moe, config.params_dtype
        num_local = moe.num_experts // config.expert_model_parallel_size
        self.gate_up_eFD = nn.Parameter(torch.empty(num_local, 2 * moe.ffn_hidden, config.hidden_size, dtype=dtype))
        self.down_eDF = nn.Parameter(torch.empty(num_local, config.hidden_size, moe.ffn_hidden, dtype=dtype))
        for weight in self.parameters():
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.group_name = expert_group_name(config.expert_model_parallel_size)  # type: ignore[attr-defined]

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Weighted results, summed where rows come from the same place; shaped like dispatched.x_ND."""
        return self.mix(
            dispatched.x_ND,
            dispatched.source_R,
            dispatched.weight_R,
            dispatched.rows_per_expert,
            self.gate_up_eFD,
            self.down_eDF,
        )
