"""RMSNorm with both passes written by hand: few passes over memory, and nothing kept but x and 1/rms of each row.

On a CPU torch's own is composed of a dozen operations, each a pass over all of x, and its backward pass of two dozen
more. Here all passes over one run of rows follow each other while the run lies in the cache. Torch's own is called
where it is best: on a GPU, where it is one kernel, and for few rows, where the host's calls are what takes the time.
"""
# R rows, D hidden, r rows of one run; g gradient of the result

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrok.kernels.norm.door import check_shapes

_FEW_ELEMENTS = 2**14
"""Of x: up to here torch's own takes 0.6 to 0.9 of the time, twice as many after it 1.0 to 1.4."""
_RUN_ELEMENTS = 2**18
"""Of x in one run: a megabyte in fp32, so that x, gradient and result of a run stay in a core's cache."""
_MOST_RUNS = 64
"""So that the host's calls are never what takes the time."""


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.rms_norm`."""
    check_shapes(x, gain, None)
    if _is_best_by_torch(x):
        return _rms_norm_by_torch(x, gain, eps)
    return _normed(x, gain, None, eps)


def add_rms_norm(residual: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.add_rms_norm`; by torch's own rounded twice."""
    check_shapes(x, gain, residual)
    if _is_best_by_torch(x):
        return residual + _rms_norm_by_torch(x, gain, eps)
    return _normed(x, gain, residual, eps)


def _is_best_by_torch(x: Tensor) -> bool:
    return x.is_cuda or (x.dtype == torch.float32 and x.numel() <= _FEW_ELEMENTS)


def _rms_norm_by_torch(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Computes in fp32, but wants x and gain of one dtype."""
    if x.dtype == gain.dtype:
        return F.rms_norm(x, gain.shape, gain, eps)
    return F.rms_norm(x.float(), gain.shape, gain.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x n g (+ residual), n = 1/rms. Backward: dg = sum_rows (dy x) n;  dx = n (dy g - x n^2 <dy x, g> / D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, residual: Tensor | None, eps: float) -> Tensor:
        width = gain.numel()
        x_RD = x.reshape(-1, width)
        wide = torch.promote_types(x.dtype, torch.float32)
        is_wide, gain_D = x.dtype == wide, gain.to(wide)
        y_RD = torch.empty_like(x_RD)
        runs = _num_runs(x_RD)
        residuals = repeat(None) if residual is None else residual.reshape(x_RD.shape).chunk(runs)
        inverses = []
        for x_rD, y_rD, residual_rD in zip(x_RD.chunk(runs), y_RD.chunk(runs), residuals, strict=False):
            run_rD = x_rD.to(wide)
            norm_r1 = torch.linalg.vector_norm(run_rD, dim=-1, keepdim=True)
            inverses.append(norm_r1.mul_(norm_r1).div_(width).add_(eps).rsqrt_())
            run_rD = torch.mul(run_rD, inverses[-1], out=y_rD if is_wide else None)
            if residual_rD is None:
                run_rD.mul_(gain_D)
            else:
                torch.addcmul(residual_rD.to(wide), run_rD, gain_D, out=run_rD)
            if not is_wide:
                y_rD.copy_(run_rD)
        ctx.save_for_backward(x_RD, gain, inverses[0] if len(inverses) == 1 else torch.cat(inverses))
        return y_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (g,) = grads
        x_RD, gain, inverse_R1 = ctx.saved_tensors
        wide = inverse_R1.dtype
        is_wide, gain_D = x_RD.dtype == wide, gain.to(wide)
        mean_gain_D, dgain_D = gain_D / -gain.numel(), torch.zeros_like(gain_D)
        dx_RD, runs = torch.empty_like(x_RD), _num_runs(x_RD)
        parts = (tensor.chunk(runs) for tensor in (g.reshape(x_RD.shape), x_RD, inverse_R1, dx_RD))
        for g_rD, x_rD, inverse_r1, dx_rD in zip(*parts, strict=True):
            g_rD, x_rD = g_rD.to(wide), x_rD.to(wide)
            run_rD = torch.mul(g_rD, x_rD, out=dx_rD if is_wide else None)
            dgain_D.addmv_(run_rD.t(), inverse_r1[:, 0])
            # The part of dy g that only makes x longer or shorter; read from the buffer before it is written over.
            along_r1 = torch.mv(run_rD, mean_gain_D)[:, None].mul_(inverse_r1).mul_(inverse_r1)
            torch.mul(g_rD, gain_D, out=run_rD).addcmul_(x_rD, along_r1).mul_(inverse_r1)
            if not is_wide:
                dx_rD.copy_(run_rD)
        return dx_RD.view(g.shape), dgain_D.to(gain.dtype), g if ctx.needs_input_grad[2] else None, None


_normed: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = _RMSNorm.apply


def _num_runs(x_RD: Tensor) -> int:
    """One for narrower dtypes: on a CPU they stand for a GPU, in a rehearsal, which pays by the call."""
    return min(-(-x_RD.numel() // _RUN_ELEMENTS) or 1, _MOST_RUNS) if x_RD.dtype == torch.float32 else 1
