"""Grok's core attention in Megatron's core_attention slot: soft-capped, causal, grouped queries, context-parallel.

Projections and rotary angles are Megatron's SelfAttention, the arithmetic is `megagrok.kernels.attention`; this is what
stands between them: whose positions, which keys, which temperature.
"""

# s this rank's positions, S all positions of the sequence, b micro-batch, h query heads and g kv heads of this rank,
# c head width

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrok.model.transformer_config import GrokTransformerConfig
from megagrok.parallel.context import context_positions, gather_sequence


class SoftcapAttention(nn.Module):
    """softmax(tau(i) * cap * tanh(q k^T / sqrt(c) / cap)) v over the keys j <= i.

    Inputs are [s, b, heads, c], the output is [s, b, h * c]. Scores and softmax are fp32. Under context parallelism
    keys and values are gathered over the context ranks, which all call it.
    """

    def __init__(self, config: GrokTransformerConfig, layer_number: int, **_slot: Any) -> None:
        super().__init__()
        self.grok = config.grok
        self.groups = config.groups
        self.attend = config.kernels.attention

    def forward(self, query_sbhc: Tensor, key_sbgc: Tensor, value_sbgc: Tensor, *_mask: Any, **_slot: Any) -> Tensor:
        group = self.groups.context
        key_Sbgc, value_Sbgc = gather_sequence(key_sbgc, group), gather_sequence(value_sbgc, group)
        query_positions_s, key_positions_S = self._positions(len(key_Sbgc), query_sbhc.device)
        return self.attend(
            query_sbhc,
            key_Sbgc,
            value_Sbgc,
            cap=self.grok.attention_softcap,
            tau_s=self._temperature(query_positions_s),
            positions=None if dist.get_world_size(group) == 1 else (query_positions_s, key_positions_S),
        )

    def _temperature(self, positions_s: Tensor) -> Tensor | None:
        """1 up to the position that the model names, then log2(position) / log2(it); fp32. None if it names none."""
        start = self.grok.attention_temperature_positions
        if start is None:
            return None
        return (positions_s.clamp(min=start).double().log2() / math.log2(start)).float()

    def _positions(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of this rank's queries, and of the gathered keys."""
        size = dist.get_world_size(self.groups.context)
        parts = [context_positions(seq_len, rank, size) for rank in range(size)]
        return parts[self.groups.coordinates.context].to(device), torch.cat(parts).to(device)
