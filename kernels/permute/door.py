"""What every implementation of permute and unpermute asks of its arguments, said once."""

import torch
from torch import Tensor

from megagrok.errors import KernelError, ShapeError


def check_permute(x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None) -> None:
    """Raises ShapeError or KernelError; reads shapes and dtypes only."""
    if x_TD.dim() != 2 or token_R.dim() != 1:
        raise ShapeError(
            f"x_TD is {list(x_TD.shape)} and token_R {list(token_R.shape)}; they have to be [T, D] and [R]."
        )
    _check_index("token_R", token_R)
    tokens, rows = len(x_TD), len(token_R)
    if rows % tokens if tokens else rows:
        raise ShapeError(f"token_R names {rows} rows of {tokens} tokens; every token has to have as many rows.")
    if inverse_TK is not None:
        _check_index("inverse_TK", inverse_TK)
        if inverse_TK.dim() != 2 or len(inverse_TK) != tokens or inverse_TK.numel() != rows:
            raise ShapeError(
                f"inverse_TK is {list(inverse_TK.shape)}; {rows} rows of {tokens} tokens have "
                f"{[tokens, rows // max(tokens, 1)]}."
            )


def check_unpermute(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> None:
    """Raises ShapeError or KernelError; reads shapes and dtypes only."""
    if rows_RD.dim() != 2 or inverse_TK.dim() != 2 or inverse_TK.numel() != len(rows_RD):
        raise ShapeError(
            f"rows_RD is {list(rows_RD.shape)} and inverse_TK {list(inverse_TK.shape)}; they have to be [R, D] and "
            "[T, K] with R = T * K."
        )
    _check_index("inverse_TK", inverse_TK)
    if weights_TK is not None and weights_TK.shape != inverse_TK.shape:
        raise ShapeError(f"weights_TK is {list(weights_TK.shape)} beside inverse_TK {list(inverse_TK.shape)}.")


def _check_index(name: str, index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise KernelError(f"{name} is {index.dtype}; rows are named by torch.int64.")
