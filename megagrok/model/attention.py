"""Grok's core attention in Megatron's core_attention slot: soft-capped, causal, grouped queries, context-parallel.

Projections and rotary angles are Megatron's SelfAttention; this is only what stands between them.
"""

# s this rank's positions, S all positions of the sequence, b micro-batch, h query heads and g kv heads of this rank,
# r = h / g query heads per kv head, c head width

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

    def forward(self, query_sbhc: Tensor, key_sbgc: Tensor, value_sbgc: Tensor, *_mask: Any, **_slot: Any) -> Tensor:
        s, b, h, c = query_sbhc.shape
        key_Sbgc, value_Sbgc = self._gather(key_sbgc), self._gather(value_sbgc)
        S, _, g, _ = key_Sbgc.shape
        r = h // g
        q_bgsc = query_sbhc.reshape(s, b, g, r, c).permute(1, 2, 3, 0, 4).reshape(b, g, r * s, c)
        k_bgcS = key_Sbgc.permute(1, 2, 3, 0)
        v_bgSc = value_Sbgc.permute(1, 2, 0, 3)

        scores_bgsS = torch.matmul(q_bgsc, k_bgcS).float() * c**-0.5
        if self.grok.attention_softcap is not None:
            cap = self.grok.attention_softcap
            scores_bgsS = torch.tanh(scores_bgsS / cap) * cap
        query_positions_s, key_positions_S = self._positions(S, query_sbhc.device)
        scores_bgrsS = scores_bgsS.view(b, g, r, s, S)
        if self.grok.attention_temperature_positions is not None:
            scores_bgrsS = scores_bgrsS * _temperature(query_positions_s, self.grok.attention_temperature_positions)
        is_later_sS = key_positions_S[None, :] > query_positions_s[:, None]
        weights_bgrsS = scores_bgrsS.masked_fill(is_later_sS, -math.inf).softmax(dim=-1)
        mixed_bgsc = torch.matmul(weights_bgrsS.to(v_bgSc.dtype).view(b, g, r * s, S), v_bgSc)
        return mixed_bgsc.view(b, g, r, s, c).permute(3, 0, 1, 2, 4).reshape(s, b, h * c)

    def _gather(self, x_sbgc: Tensor) -> Tensor:
        return gather_sequence(x_sbgc, self.groups.context)

    def _positions(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of this rank's queries, and of the gathered keys."""
        size = dist.get_world_size(self.groups.context)
        parts = [context_positions(seq_len, rank, size) for rank in range(size)]
        return parts[self.groups.coordinates.context].to(device), torch.cat(parts).to(device)


def _temperature(positions_s: Tensor, start: int) -> Tensor:
    """1 up to position `start`, then log2(position) / log2(start); [s, 1], fp32."""
    return (positions_s.clamp(min=start).double().log2() / math.log2(start)).float()[:, None]
