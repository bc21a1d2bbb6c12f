"""Soft-capped causal attention in plain torch: the specification. Scores lie whole in memory; autograd differentiates.

Not fast, and of any dtype: the tests run it in fp64.
"""

# s queries, S keys, b micro-batch, h query heads, g kv heads, c head width

import math

import torch
from torch import Tensor

from megagrok.kernels.attention.shapes import check_shapes


def attention(
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    v_Sbgc: Tensor,
    *,
    cap: float | None,
    tau_s: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `megagrok.kernels.attention.Attention` says."""
    check_shapes(q_sbhc, k_Sbgc, v_Sbgc, cap, tau_s, positions)
    (s, _, h, c), (S, _, g, _) = q_sbhc.shape, k_Sbgc.shape
    wide = torch.promote_types(q_sbhc.dtype, torch.float32)
    k_Sbhc, v_Sbhc = (x.repeat_interleave(h // g, dim=2) for x in (k_Sbgc, v_Sbgc))
    scores_bhsS = torch.einsum("sbhc,Sbhc->bhsS", q_sbhc.to(wide), k_Sbhc.to(wide)) * c**-0.5
    if cap is not None:
        scores_bhsS = cap * torch.tanh(scores_bhsS / cap)
    if tau_s is not None:
        scores_bhsS = scores_bhsS * tau_s.to(wide)[:, None]
    if positions is None:
        positions = (torch.arange(s, device=q_sbhc.device), torch.arange(S, device=q_sbhc.device))
    is_later_sS = positions[1][None, :] > positions[0][:, None]
    weights_bhsS = scores_bhsS.masked_fill(is_later_sS, -math.inf).softmax(dim=-1)
    return torch.einsum("bhsS,Sbhc->sbhc", weights_bhsS.to(v_Sbhc.dtype), v_Sbhc).flatten(-2)
