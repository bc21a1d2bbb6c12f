"""RMSNorm as it is defined: plain torch, one line after the other, differentiated by autograd."""
# ... any leading dimensions, D hidden

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; fp32 inside, or wider if x is."""
    return _normed(x, gain, eps).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """residual + RMSNorm(x)."""
    return (residual + _normed(x, gain, eps)).to(x.dtype)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, gain = x.to(wide), gain.to(wide)
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * gain
