"""Permute and unpermute in Triton: a program owns the rows it writes, so nothing is added into memory twice.

The sum over a token's K rows is kept in registers, fp32, in the order of k; each row is read once, the result written
once: the time is that of moving those bytes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# T tokens, K top-k, R = T * K rows, D hidden

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrok.kernels.permute.door import check_permute, check_unpermute
from megagrok.kernels.permute.torch_ops import rows_of_tokens

_WIDEST_BLOCK = 2048
"""Columns that a program holds at once: 16 values for each thread of four warps."""


def permute(x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None = None) -> Tensor:
    """`megagrok.kernels.permute.Gather`."""
    check_permute(x_TD, token_R, inverse_TK)
    return _permuted(x_TD, token_R, inverse_TK)


def unpermute(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """`megagrok.kernels.permute.GatherAndSum`."""
    check_unpermute(rows_RD, inverse_TK, weights_TK)
    return _unpermuted(rows_RD, inverse_TK, weights_TK)


def gather(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """rows[r] = x[token_R[r]], outside of autograd."""
    x_TD, hidden = x_TD.contiguous(), x_TD.shape[1]
    rows_RD = x_TD.new_empty(len(token_R), hidden)
    if rows_RD.numel():
        block = _block(hidden)
        _gather[(len(token_R), triton.cdiv(hidden, block))](x_TD, token_R.contiguous(), rows_RD, hidden, block)
    return rows_RD


def gather_and_sum(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """out[t] = sum over k of weights[t, k] rows[inverse[t, k]], outside of autograd."""
    (num_tokens, top_k), hidden = inverse_TK.shape, rows_RD.shape[1]
    out_TD = rows_RD.new_empty(num_tokens, hidden)
    if out_TD.numel():
        block, weights = _block(hidden), None if weights_TK is None else weights_TK.contiguous()
        _gather_and_sum[(num_tokens, triton.cdiv(hidden, block))](
            rows_RD.contiguous(), inverse_TK.contiguous(), weights, out_TD, top_k, hidden, weights is not None, block
        )
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_R, inverse_TK)
        ctx.num_tokens = len(x_TD)
        return gather(x_TD, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        token_R, inverse_TK = ctx.saved_tensors
        inverse = rows_of_tokens(token_R, ctx.num_tokens) if inverse_TK is None else inverse_TK
        return gather_and_sum(grads[0], inverse, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
        # Without weights, the rows' values are not needed: their gradient is a copy.
        ctx.save_for_backward(None if weights_TK is None else rows_RD, inverse_TK, weights_TK)
        return gather_and_sum(rows_RD, inverse_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        rows_RD, inverse_TK, weights_TK = ctx.saved_tensors
        dout_TD, inverse_TK = grads[0].contiguous(), inverse_TK.contiguous()
        (num_tokens, top_k), hidden = inverse_TK.shape, dout_TD.shape[1]
        drows_RD = dout_TD.new_empty(num_tokens * top_k, hidden)
        dweights_TK = None if weights_TK is None else torch.empty_like(inverse_TK, dtype=weights_TK.dtype)
        if inverse_TK.numel():
            weights = None if weights_TK is None else weights_TK.contiguous()
            rows = None if rows_RD is None else rows_RD.contiguous()
            _scatter[(num_tokens, top_k)](
                dout_TD, rows, inverse_TK, weights, drows_RD, dweights_TK, top_k, hidden,
                weights is not None, _block(hidden),
            )  # fmt: skip
        return drows_RD, None, dweights_TK


_permuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Permute.apply
_unpermuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Unpermute.apply


def _block(hidden: int) -> int:
    return min(int(triton.next_power_of_2(hidden)), _WIDEST_BLOCK)


@triton.jit
def _gather(x_TD, token_R, rows_RD, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = columns < D
    token = tl.load(token_R + row)
    tl.store(rows_RD + row * D + columns, tl.load(x_TD + token * D + columns, mask=in_D), mask=in_D)


@triton.jit
def _gather_and_sum(rows_RD, inverse_TK, weights_TK, out_TD, K, D, HAS_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = columns < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(K):
        row = tl.load(inverse_TK + token * K + k)
        values = tl.load(rows_RD + row * D + columns, mask=in_D, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights_TK + token * K + k)
        total += values
    tl.store(out_TD + token * D + columns, total.to(out_TD.dtype.element_ty), mask=in_D)


@triton.jit
def _scatter(
    dout_TD, rows_RD, inverse_TK, weights_TK, drows_RD, dweights_TK, K, D,
    HAS_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, choice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(inverse_TK + token * K + choice)
    total = tl.zeros((BLOCK_D,), tl.float32)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_TK + token * K + choice)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        in_D = columns < D
        dout = tl.load(dout_TD + token * D + columns, mask=in_D, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            total += dout * tl.load(rows_RD + row * D + columns, mask=in_D, other=0.0).to(tl.float32)
        tl.store(drows_RD + row * D + columns, (dout * weight).to(drows_RD.dtype.element_ty), mask=in_D)
    if HAS_WEIGHTS:
        tl.store(dweights_TK + token * K + choice, tl.sum(total, axis=0))
