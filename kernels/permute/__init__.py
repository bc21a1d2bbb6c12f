"""Rows by token to rows by expert, and back with a sum: the data movement of dispatch. Two operations, no atomics.

    permute     rows_RD[r] = x_TD[token_R[r]]                                       a copy
    unpermute   out_TD[t]  = sum over k of weights_TK[t, k] rows_RD[inverse_TK[t, k]]   a gather and a sum

Each is the other's backward pass, so neither ever adds into memory that another row adds into.
"""

# T tokens, K top-k, R = T * K rows, D hidden

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megagrok.kernels.choice import choose


class Gather(Protocol):
    """`permute` of every implementation."""

    def __call__(self, x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None = None) -> Tensor:
        """rows_RD[r] = x_TD[token_R[r]]; its gradient sums a token's K rows in fp32.

        token_R: int64 in [0, T), every token R / T times. inverse_TK: the rows of each token, in any order; without it
        the backward pass sorts token_R. Any float dtype. Raises ShapeError, KernelError.
        """


class GatherAndSum(Protocol):
    """`unpermute` of every implementation."""

    def __call__(self, rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """out_TD[t] = sum over k of weights_TK[t, k] * rows_RD[inverse_TK[t, k]], without weights plainly.

        inverse_TK: int64, every row of rows_RD once. weights_TK: fp32 (or the rows' dtype if wider). The sum is fp32
        and in the order of k; the result has the rows' dtype. Differentiable in rows and weights.
        Raises ShapeError, KernelError.
        """


@dataclass(frozen=True, slots=True)
class Permute:
    """Both directions, of one implementation."""

    permute: Gather
    unpermute: GatherAndSum


def choose_permute(wanted: str, device: torch.device) -> Permute:
    """The implementation of that name, or the fastest there for `auto`. Raises KernelError if it cannot run there."""
    if choose("permute", wanted, device) == "triton":
        from megagrok.kernels.permute.kernel import permute, unpermute

        return Permute(permute, unpermute)
    from megagrok.kernels.permute.torch_ops import permute, unpermute

    return Permute(permute, unpermute)
