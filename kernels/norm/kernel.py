"""RMSNorm in Triton: each pass reads its inputs once and writes its results once.

A program holds whole rows in registers, so the sum over a row needs no second look at it. Backward, a fixed number of
programs shares the rows; each keeps its part of the gain's gradient in registers and writes it to a row of its own, and
torch sums these: no atomics, the same bits every time, on every GPU of a kind.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# R rows, D hidden, P programs of the backward pass

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.norm.door import check_shapes

_WIDEST = 16384
"""Elements of a row: 64 KiB of registers in fp32 for each of x, gradient and gain; more would spill."""
_BLOCK_ELEMENTS = 2048
"""Of the rows that a program holds at once: narrow rows go several at a time."""
_BACKWARD_PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors, so that one loads while the other computes. Fixed: the order of the
gain's sum, and so its last bits, shall not depend on the device."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.rms_norm`. Raises KernelError also for rows wider than 16,384 and for fp64."""
    _check(x, gain, None)
    return _normed(x, gain, None, eps)


def add_rms_norm(residual: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `Norm.add_rms_norm`. Raises KernelError as `rms_norm`."""
    _check(x, gain, residual)
    return _normed(x, gain, residual, eps)


def _check(x: Tensor, gain: Tensor, residual: Tensor | None) -> None:
    check_shapes(x, gain, residual)
    if gain.numel() > _WIDEST:
        raise KernelError(f"norm takes rows of up to {_WIDEST}, got {gain.numel()}. Fix: kernels.norm=torch.")
    for tensor in (x, gain):
        if tensor.dtype not in _DTYPES:
            raise KernelError(f"norm takes fp32, bf16 and fp16, got {tensor.dtype}. Fix: kernels.norm=torch.")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, residual: Tensor | None, eps: float) -> Tensor:
        width = gain.numel()
        x_RD, gain_D = x.reshape(-1, width).contiguous(), gain.contiguous()
        residual_RD = None if residual is None else residual.reshape(-1, width).contiguous()
        y_RD, inverse_R = torch.empty_like(x_RD), x_RD.new_empty(len(x_RD), dtype=torch.float32)
        tile = _tile(width)
        _forward[(triton.cdiv(len(x_RD), tile["BLOCK_R"]),)](
            x_RD, gain_D, residual_RD, y_RD, inverse_R, eps, len(x_RD), width, residual is not None, **tile
        )
        ctx.save_for_backward(x_RD, gain_D, inverse_R)
        return y_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (g,) = grads
        x_RD, gain_D, inverse_R = ctx.saved_tensors
        num_rows, width = x_RD.shape
        tile = _tile(width)
        programs = min(_BACKWARD_PROGRAMS, triton.cdiv(num_rows, tile["BLOCK_R"]))
        g_RD, dx_RD = g.reshape(x_RD.shape).contiguous(), torch.empty_like(x_RD)
        dgain_PD = x_RD.new_empty(programs, width, dtype=torch.float32)
        _backward[(programs,)](g_RD, x_RD, gain_D, inverse_R, dx_RD, dgain_PD, num_rows, width, programs, **tile)
        return dx_RD.view(g.shape), dgain_PD.sum(dim=0).to(gain_D.dtype), g if ctx.needs_input_grad[2] else None, None


_normed: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = _RMSNorm.apply


def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a block, and warps: some 16 elements of each tensor for a thread."""
    columns = triton.next_power_of_2(width)
    rows = max(_BLOCK_ELEMENTS // columns, 1)
    return {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": min(max(rows * columns // 512, 4), 16)}


@triton.jit
def _forward(
    x_RD,
    gain_D,
    residual_RD,
    y_RD,
    inverse_R,
    eps,
    R,
    D,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    in_R, in_D = rows < R, columns < D
    at_RD, in_RD = rows[:, None] * D + columns[None, :], in_R[:, None] & in_D[None, :]
    x = tl.load(x_RD + at_RD, mask=in_RD, other=0.0).to(tl.float32)
    gain = tl.load(gain_D + columns, mask=in_D, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    y = x * inverse[:, None] * gain[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_RD + at_RD, mask=in_RD, other=0.0).to(tl.float32)
    tl.store(y_RD + at_RD, y.to(y_RD.dtype.element_ty), mask=in_RD)
    tl.store(inverse_R + rows, inverse, mask=in_R)


@triton.jit
def _backward(
    g_RD, x_RD, gain_D, inverse_R, dx_RD, dgain_PD, R, D, programs, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    in_D = columns < D
    gain = tl.load(gain_D + columns, mask=in_D, other=0.0).to(tl.float32)
    dgain = tl.zeros([BLOCK_D], dtype=tl.float32)
    for block in tl.range(program, tl.cdiv(R, BLOCK_R), programs, num_stages=3):
        rows = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_R = rows < R
        at_RD, in_RD = rows[:, None] * D + columns[None, :], in_R[:, None] & in_D[None, :]
        g = tl.load(g_RD + at_RD, mask=in_RD, other=0.0).to(tl.float32)
        x = tl.load(x_RD + at_RD, mask=in_RD, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_R + rows, mask=in_R, other=0.0)
        unit = x * inverse[:, None]
        along = tl.sum(g * unit * gain[None, :], axis=1) / D
        dx = (g * gain[None, :] - unit * along[:, None]) * inverse[:, None]
        tl.store(dx_RD + at_RD, dx.to(dx_RD.dtype.element_ty), mask=in_RD)
        dgain += tl.sum(g * unit, axis=0)
    tl.store(dgain_PD + program.to(tl.int64) * D + columns, dgain, mask=in_D)
