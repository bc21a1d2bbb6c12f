"""This rank's experts: gated tanh-GELU MLPs on rows that are already sorted by expert."""

# R rows, e experts of this rank, D hidden, F expert width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrok.model.transformer_config import GrokTransformerConfig
from megagrok.parallel.groups import expert_group_name


class Experts(nn.Module):
    """down( gelu_tanh(gate(x)) * up(x) ), one set of weights per local expert, stacked.

    The tags are DeepSpeed's contract for expert parameters: `allreduce` False and `group_name` send the gradient to
    the expert-data group instead of the data group (deepspeed/moe/experts.py).
    """

    def __init__(self, config: GrokTransformerConfig) -> None:
        super().__init__()
        moe, dtype = config.grok.moe, config.params_dtype
        num_local = moe.num_experts // config.expert_model_parallel_size
        self.gate_up_eFD = nn.Parameter(torch.empty(num_local, 2 * moe.ffn_hidden, config.hidden_size, dtype=dtype))
        self.down_eDF = nn.Parameter(torch.empty(num_local, config.hidden_size, moe.ffn_hidden, dtype=dtype))
        for weight in self.parameters():
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.group_name = expert_group_name(config.expert_model_parallel_size)  # type: ignore[attr-defined]

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """rows_RD sorted by expert; rows_per_expert sums to R and may hold zeros. Returns [R, D]."""
        results = []
        weights = zip(self.gate_up_eFD.unbind(0), self.down_eDF.unbind(0), strict=True)
        for rows, (gate_up_FD, down_DF) in zip(rows_RD.split(rows_per_expert), weights, strict=True):
            gate, up = F.linear(rows, gate_up_FD).chunk(2, dim=-1)
            results.append(F.linear(F.gelu(gate, approximate="tanh") * up, down_DF))
        return torch.cat(results)
