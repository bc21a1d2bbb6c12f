"""Permute and unpermute in torch, each the other's backward pass: the fast implementation on a CPU.

In fp32 the gather-and-sum is `embedding_bag`, whose weighted sum of table rows is exactly this operation in one pass
over memory. In narrower dtypes it would round the weights, so there a block of tokens at a time is gathered, widened
and summed.
"""

# T tokens, t tokens of a block, K top-k, R = T * K rows, D hidden

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagrok.kernels.permute.door import check_permute, check_unpermute

CPU_BLOCK_TOKENS = 128
"""Tokens whose widened rows are held at once on a CPU: they stay in the cache."""


def permute(x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None = None) -> Tensor:
    """`megagrok.kernels.permute.Gather`."""
    check_permute(x_TD, token_R, inverse_TK)
    return _permuted(x_TD, token_R, inverse_TK)


def unpermute(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """`megagrok.kernels.permute.GatherAndSum`."""
    check_unpermute(rows_RD, inverse_TK, weights_TK)
    return _unpermuted(rows_RD, inverse_TK, weights_TK)


def rows_of_tokens(token_R: Tensor, num_tokens: int) -> Tensor:
    """inverse_TK of a token_R that names every token equally often."""
    return token_R.argsort(stable=True).view(num_tokens, -1 if num_tokens else 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_R, inverse_TK)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        token_R, inverse_TK = ctx.saved_tensors
        inverse = rows_of_tokens(token_R, ctx.num_tokens) if inverse_TK is None else inverse_TK
        return gather_and_sum(grads[0].contiguous(), inverse, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
        # Without weights, the rows' values are not needed: their gradient is a copy.
        ctx.save_for_backward(None if weights_TK is None else rows_RD, inverse_TK, weights_TK)
        return gather_and_sum(rows_RD.contiguous(), inverse_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        rows_RD, inverse_TK, weights_TK = ctx.saved_tensors
        dout_TD = grads[0].contiguous()
        (num_tokens, top_k), hidden = inverse_TK.shape, dout_TD.shape[1]
        drows_RD = dout_TD.new_empty(inverse_TK.numel(), hidden)
        if weights_TK is None:
            for choice in range(top_k):
                drows_RD.index_copy_(0, inverse_TK[:, choice], dout_TD)
            return drows_RD, None, None
        dweights_TK = torch.empty_like(weights_TK)
        for start, stop in _blocks(num_tokens, dout_TD.device):
            inverse = inverse_TK[start:stop].reshape(-1)
            dout_tD = dout_TD[start:stop].to(weights_TK.dtype)
            rows_tKD = rows_RD.index_select(0, inverse).view(stop - start, top_k, hidden).to(weights_TK.dtype)
            torch.sum(rows_tKD * dout_tD[:, None], dim=-1, out=dweights_TK[start:stop])
            drows = (weights_TK[start:stop, :, None] * dout_tD[:, None]).to(drows_RD.dtype)
            drows_RD.index_copy_(0, inverse, drows.view(-1, hidden))
        return drows_RD, None, dweights_TK


_permuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Permute.apply
_unpermuted: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Unpermute.apply


def gather_and_sum(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """The sum itself, outside of autograd; fp32 inside, the rows' dtype out."""
    (num_tokens, top_k), hidden = inverse_TK.shape, rows_RD.shape[1]
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    if rows_RD.dtype == wide and rows_RD.device.type == "cpu" and rows_RD.numel() > 0:
        weights = None if weights_TK is None else weights_TK.to(wide)
        return torch.nn.functional.embedding_bag(inverse_TK, rows_RD, mode="sum", per_sample_weights=weights)
    out_TD = rows_RD.new_empty(num_tokens, hidden)
    for start, stop in _blocks(num_tokens, rows_RD.device):
        rows = rows_RD.index_select(0, inverse_TK[start:stop].reshape(-1)).view(stop - start, top_k, hidden).to(wide)
        if weights_TK is not None:
            rows = rows * weights_TK[start:stop, :, None]
        out_TD[start:stop] = rows.sum(dim=1)
    return out_TD


def _blocks(num_tokens: int, device: torch.device) -> list[tuple[int, int]]:
    """Runs of tokens, [start, stop). A GPU takes all of them at once."""
    step = CPU_BLOCK_TOKENS if device.type == "cpu" else max(num_tokens, 1)
    return [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
