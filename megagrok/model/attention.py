"""Grok's core attention in Megatron's core_attention slot: soft-capped, causal, grouped queries, context-parallel.

Projections and rotary angles are Megatron's SelfAttention; this is only what stands between them.
"""

# s this rank's positions, S all positions of the sequence, b micro-batch, h query heads and g kv heads of this rank,
# r = h / g query heads per kv head, c head width, n = b * g, q = r * s

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrok.model.transformer_config import GrokTransformerConfig
from megagrok.parallel.context import context_positions, gather_sequence

# Queries a block; shorter ones cost more in calls than they save in scores (on a CPU, 256 and 512 positions).
_SHORTEST_BLOCK = 64
_MOST_BLOCKS = 8


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
        q_nrsc = query_sbhc.reshape(s, b * g, h // g, c).permute(1, 2, 0, 3)
        k_ncS = key_Sbgc.reshape(S, b * g, c).permute(1, 2, 0)
        v_nSc = value_Sbgc.reshape(S, b * g, c).transpose(0, 1)
        query_positions_s, key_positions_S = self._positions(S, query_sbhc.device)
        mixed = []
        for start, end, num_keys in _blocks(s, S):
            bias_sS = _causal_bias(query_positions_s[start:end], key_positions_S[:num_keys])
            tau_s = self._temperature(query_positions_s[start:end])
            mixed.append(
                self._mix(q_nrsc[:, :, start:end], k_ncS[:, :, :num_keys], v_nSc[:, :num_keys], bias_sS, tau_s)
            )
        return torch.cat(mixed, dim=2).permute(2, 0, 1, 3).reshape(s, b, h * c)

    def _mix(self, q_nrsc: Tensor, k_ncS: Tensor, v_nSc: Tensor, bias_sS: Tensor, tau_s: Tensor | None) -> Tensor:
        """Attention of some queries over some keys: few passes over the scores, which are most of the memory."""
        n, r, s, c = q_nrsc.shape
        cap = self.grok.attention_softcap
        any_nqS = q_nrsc.new_empty(()).expand(n, r * s, k_ncS.shape[2])
        scale = c**-0.5 if cap is None else c**-0.5 / cap
        scores_nqS = torch.baddbmm(any_nqS, q_nrsc.reshape(n, r * s, c), k_ncS, beta=0, alpha=scale).float()
        if cap is not None:
            scores_nqS = scores_nqS.tanh_()
        scores_nrsS = scores_nqS.view(n, r, s, -1)
        if tau_s is not None:
            scores_nrsS = scores_nrsS * tau_s[:, None]
        weights_nrsS = torch.add(bias_sS, scores_nrsS, alpha=1.0 if cap is None else cap).softmax(dim=-1)
        return torch.bmm(weights_nrsS.to(v_nSc.dtype).view(n, r * s, -1), v_nSc).view(n, r, s, c)

    def _gather(self, x_sbgc: Tensor) -> Tensor:
        return gather_sequence(x_sbgc, self.groups.context)

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


def _blocks(num_queries: int, num_keys: int) -> Iterator[tuple[int, int, int]]:
    """Runs of queries (start, end) and how many of the first keys they need.

    Later keys than the run's last query weigh nothing, so a run leaves them out: with eight runs, 7/16 of the square.
    Under context parallelism (more keys than queries) keys are not in order, and the one run needs them all.
    """
    size = num_queries
    if num_keys == num_queries:
        size = max(_SHORTEST_BLOCK, math.ceil(num_queries / _MOST_BLOCKS))
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        yield start, end, end if num_keys == num_queries else num_keys


def _causal_bias(query_positions_s: Tensor, key_positions_S: Tensor) -> Tensor:
    """0 where a query may look, -inf at keys after it; [s, S], fp32."""
    is_later_sS = key_positions_S[None, :] > query_positions_s[:, None]
    return torch.zeros(is_later_sS.shape, device=is_later_sS.device).masked_fill_(is_later_sS, -math.inf)
