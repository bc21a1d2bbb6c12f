"""Soft-capped causal attention with grouped queries: the signature, and which implementation a device gets.

softmax_j(tau(i) * cap * tanh(q_i k_j / sqrt(c) / cap)) v_j over the keys j that stand no later than query i. The maths
of both directions is in README.md; reference.py is the specification.
"""

from typing import Protocol

import torch
from torch import Tensor

from megagrok.kernels.choice import choose


class Attention(Protocol):
    """What every implementation is. Shapes are exact; nothing is broadcast."""

    def __call__(
        self,
        q_sbhc: Tensor,
        k_Sbgc: Tensor,
        v_Sbgc: Tensor,
        *,
        cap: float | None,
        tau_s: Tensor | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Mix the values by the scores; [s, b, h * c] in q's dtype. Query head i reads kv head floor(i / (h/g)).

        cap: scores stay within +-cap; None for no cap. tau_s: fp32 factor > 0 on the capped scores of each query, no
        gradient; None for 1. positions: where the queries (s) and keys (S) stand in the sequence, int64; None if both
        are 0, 1, 2, ... and s = S. Every query has a key that is no later. Scores and softmax are fp32, in fp64 fp64.
        Differentiable once, in q, k and v. No collective: with a sequence spread over ranks, keys and values of all of
        it come gathered. Raises KernelError for other shapes, or shapes that the implementation cannot take.
        """
        ...


def choose_attention(wanted: str, device: torch.device) -> Attention:
    """The implementation called `wanted`, or the one that `auto` means there. Raises KernelError if there is none."""
    if choose("attention", wanted, device) == "triton":
        import megagrok.kernels.attention.kernel as triton_ops

        return triton_ops.attention
    import megagrok.kernels.attention.torch_ops as torch_ops

    return torch_ops.attention
