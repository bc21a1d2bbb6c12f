"""Soft-capped causal attention in Triton."""

from torch import Tensor

from megagrok.errors import KernelError


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
    raise KernelError("attention has no Triton implementation yet. Fix: kernels.attention=auto.")
