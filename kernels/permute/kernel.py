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

_BLOCK_ELEMENTS = 2048
"""What a program holds at once: 16 values for each thread of four warps."""


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
        tile = _tile(hidden)
        grid = (triton.cdiv(len(token_R), tile["BLOCK_R"]), triton.cdiv(hidden, tile["BLOCK_D"]))
        _gather[grid](x_TD, token_R.contiguous(), rows_RD, len(token_R), hidden, **tile)
    return rows_RD


def gather_and_sum(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """out[t] = sum over k of weights[t, k] rows[inverse[t, k]], outside of autograd."""
    (num_tokens, top_k), hidden = inverse_TK.shape, rows_RD.shape[1]
    out_TD = rows_RD.new_empty(num_tokens, hidden)
    if out_TD.numel():
        tile, weights = _tile(hidden), None if weights_TK is None else weights_TK.contiguous()
        grid = (triton.cdiv(num_tokens, tile["BLOCK_R"]), triton.cdiv(hidden, tile["BLOCK_D"]))
        _gather_and_sum[grid](
            rows_RD.contiguous(), inverse_TK.contiguous(), weights, out_TD, num_tokens, top_k, hidden,
            HAS_WEIGHTS=weights is not None, **tile,
        )  # fmt: skip
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
            tile = _tile(hidden)
            _scatter[(triton.cdiv(num_tokens, tile["BLOCK_R"]), top_k)](
                dout_TD, rows, inverse_TK, weights, drows_RD, dweights_TK, num_tokens, top_k, hidden,
                HAS_WEIGHTS=weights is not None, **tile,
            )  # fmt: skip
        return drows_RD, None, dweights_TK


_permuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Permute.apply
_unpermuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Unpermute.apply


def _tile(hidden: int) -> dict[str, int]:
    """Rows and columns of a block: narrow rows go several at a time."""
    columns = min(int(triton.next_power_of_2(hidden)), _BLOCK_ELEMENTS)
    return {"BLOCK_R": _BLOCK_ELEMENTS // columns, "BLOCK_D": columns}


@triton.jit
def _gather(x_TD, token_R, rows_RD, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_R, in_D = rows < R, columns < D
    in_RD = in_R[:, None] & in_D[None, :]
    token = tl.load(token_R + rows, mask=in_R, other=0)
    values = tl.load(x_TD + token[:, None] * D + columns[None, :], mask=in_RD)
    tl.store(rows_RD + rows[:, None] * D + columns[None, :], values, mask=in_RD)


@triton.jit
def _gather_and_sum(
    rows_RD, inverse_TK, weights_TK, out_TD, T, K, D,
    HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_T, in_D = tokens < T, columns < D
    in_TD = in_T[:, None] & in_D[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for k in range(K):
        rows = tl.load(inverse_TK + tokens * K + k, mask=in_T, other=0)
        values = tl.load(rows_RD + rows[:, None] * D + columns[None, :], mask=in_TD, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights_TK + tokens * K + k, mask=in_T, other=0.0)[:, None]
        total += values
    tl.store(out_TD + tokens[:, None] * D + columns[None, :], total.to(out_TD.dtype.element_ty), mask=in_TD)


@triton.jit
def _scatter(
    dout_TD, rows_RD, inverse_TK, weights_TK, drows_RD, dweights_TK, T, K, D,
    HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    choices = tokens * K + tl.program_id(1)
    in_T = tokens < T
    rows = tl.load(inverse_TK + choices, mask=in_T, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        in_TD = in_T[:, None] & (columns < D)[None, :]
        at_RD = rows[:, None] * D + columns[None, :]
        drows = tl.load(dout_TD + tokens[:, None] * D + columns[None, :], mask=in_TD, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            total += drows * tl.load(rows_RD + at_RD, mask=in_TD, other=0.0).to(tl.float32)
            drows *= tl.load(weights_TK + choices, mask=in_T, other=0.0)[:, None]
        tl.store(drows_RD + at_RD, drows.to(drows_RD.dtype.element_ty), mask=in_TD)
    if HAS_WEIGHTS:
        tl.store(dweights_TK + choices, tl.sum(total, axis=1), mask=in_T)
