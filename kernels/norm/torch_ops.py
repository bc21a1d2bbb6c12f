"""RMSNorm with both passes written by hand: few passes over memory, and nothing kept but x and 1/rms of each row.

On a CPU torch's own is composed of a dozen operations, each a pass over all of x, and its backward pass of two dozen
more. Here all passes over one run of rows follow each other while the run lies in the cache. On a GPU torch has
one kernel for it, which is called instead.
"""
# R rows, D hidden, r rows of one run; g gradient of the result

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrok.kernels.norm import check_shapes

_RUN_ELEMENTS = 2**18
"""Of x in one run: a megabyte in fp32, so that x, gradient and result of a run stay in a core's cache."""


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.rms_norm`."""
    check_shapes(x, gain, None)
    if x.is_cuda:
        return _rms_norm_on_gpu(x, gain, eps)
    return _normed(x, gain, None, eps)


def add_rms_norm(residual: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.add_rms_norm`; on a GPU rounded twice."""
    check_shapes(x, gain, residual)
    if x.is_cuda:
        return residual + _rms_norm_on_gpu(x, gain, eps)
    return _normed(x, gain, residual, eps)


def _rms_norm_on_gpu(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """torch's fused kernel computes in fp32, but wants x and gain of one dtype."""
    if x.dtype == gain.dtype:
        return F.rms_norm(x, gain.shape, gain, eps)
    return F.rms_norm(x.float(), gain.shape, gain.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x n g (+ residual), n = 1/rms. Backward: dg = sum_rows (dy x) n;  dx = n (dy g - x n^2 <dy x, g> / D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, residual: Tensor | None, eps: float) -> Tensor:
        x_RD = x.reshape(-1, gain.numel())
        wide = torch.promote_types(x.dtype, torch.float32)
        y_RD, n_R1 = torch.empty_like(x_RD), x_RD.new_empty(len(x_RD), 1, dtype=wide)
        gain_D = gain.to(wide)
        residual_RD = None if residual is None else residual.reshape(x_RD.shape)
        for run in _runs(x_RD):
            x_rD, n_r1 = x_RD[run].to(wide), n_R1[run]
            torch.linalg.vector_norm(x_rD, dim=-1, keepdim=True, out=n_r1)
            n_r1.square_().div_(gain.numel()).add_(eps).rsqrt_()
            y_rD = torch.mul(x_rD, n_r1, out=y_RD[run] if x.dtype == wide else None)
            if residual_RD is None:
                y_rD.mul_(gain_D)
            else:
                torch.addcmul(residual_RD[run].to(wide), y_rD, gain_D, out=y_rD)
            if x.dtype != wide:
                y_RD[run] = y_rD
        ctx.save_for_backward(x_RD, gain, n_R1)
        return y_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (g,) = grads
        x_RD, gain, n_R1 = ctx.saved_tensors
        g_RD, gain_D = g.reshape(x_RD.shape), gain.to(n_R1.dtype)
        dx_RD, dgain_D = torch.empty_like(x_RD), torch.zeros_like(gain_D)
        for run in _runs(x_RD):
            x_rD, g_rD, n_r1 = x_RD[run].to(n_R1.dtype), g_RD[run].to(n_R1.dtype), n_R1[run]
            dx_rD = torch.mul(g_rD, x_rD, out=dx_RD[run] if x_RD.dtype == n_R1.dtype else None)
            dgain_D.addmv_(dx_rD.t(), n_r1[:, 0])
            # The row's part of <dy x, g>, before its buffer is written over.
            along_x_r1 = torch.mv(dx_rD, gain_D)[:, None].mul_(n_r1).mul_(n_r1).div_(-gain.numel())
            torch.mul(g_rD, gain_D, out=dx_rD).addcmul_(x_rD, along_x_r1).mul_(n_r1)
            if x_RD.dtype != n_R1.dtype:
                dx_RD[run] = dx_rD
        return dx_RD.view(g.shape), dgain_D.to(gain.dtype), g if ctx.needs_input_grad[2] else None, None


_normed: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = _RMSNorm.apply


def _runs(x_RD: Tensor) -> list[slice]:
    """Rows that are worked on together. Of narrower dtypes one run: they are a GPU's, and a rehearsal counts calls."""
    num_rows, width = x_RD.shape
    length = max(_RUN_ELEMENTS // max(width, 1), 1) if x_RD.dtype == torch.float32 else max(num_rows, 1)
    return [slice(start, start + length) for start in range(0, num_rows, length)]
