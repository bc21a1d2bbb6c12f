"""Permute and unpermute in plain torch: what every other implementation has to equal. Differentiable by autograd."""

# T tokens, K top-k, R = T * K rows, D hidden

import torch
from torch import Tensor


def permute(x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None = None) -> Tensor:
    """rows_RD[r] = x_TD[token_R[r]]."""
    return x_TD[token_R]


def unpermute(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """out_TD[t] = sum over k of weights_TK[t, k] * rows_RD[inverse_TK[t, k]]."""
    rows_TKD = rows_RD[inverse_TK].to(torch.promote_types(rows_RD.dtype, torch.float32))
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK[:, :, None]
    return rows_TKD.sum(dim=1).to(rows_RD.dtype)
