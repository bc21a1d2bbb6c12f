"""RMSNorm, alone and added to a residual stream. Which implementation: `choose_norm`, once, when a model is built."""
# ... any leading dimensions, D hidden

from typing import Protocol

import torch
from torch import Tensor

from megagrok.kernels.choice import choose


class Norm(Protocol):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, in fp32 (wider if x is), returned in x's dtype.

    gain [D] may have another dtype than x; its gradient has its own. No ranks: under sequence parallelism the gain's
    gradient is this rank's part of the whole. Both are deterministic, and both raise KernelError where shapes differ.
    """

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """RMSNorm(x), [..., D]. Differentiable in x and gain; keeps x and one number a row."""

    def add_rms_norm(self, residual: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """residual + RMSNorm(x), rounded once; residual has x's shape and dtype. Differentiable in all three."""


def choose_norm(wanted: str, device: torch.device) -> Norm:
    """The implementation named `wanted`, or the fastest measured on such a device ("auto"). Raises KernelError."""
    if choose("norm", wanted, device) == "triton":
        import megagrok.kernels.norm.kernel as triton_ops

        return triton_ops
    import megagrok.kernels.norm.torch_ops as torch_ops

    return torch_ops
