"""Which experts a token visits, with which weights, and what its auxiliary losses are made of.

Which implementation: `choose_router`, once, when a model is built.
"""
# T tokens, D hidden, E experts, K top-k

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.choice import choose

Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Routed:
    """One call's decisions, and sums over its tokens that the auxiliary losses are made of; fp32 (wider if x is)."""

    weights_TK: Tensor
    """Of the K experts, best first. With gradient."""
    experts_TK: Tensor
    """int64, K different ones a row."""
    tokens_per_expert_E: Tensor
    """int64, sums to T * K."""
    probability_sum_E: Tensor
    """Sum over the tokens of p_te, which sums to 1 over the experts. With gradient."""
    z_sum: Tensor
    """Sum over the tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, eq. 5). With gradient."""


class Router(Protocol):
    """logits = x weight^T, squashed to cap * tanh(logits / cap); scores of them; the K highest of each token.

    softmax: scores and probabilities p are the softmax over all experts.  sigmoid: scores are sigmoids one by one,
    p their share of the token's sum.  renormalize: a token's K weights are divided by their sum.
    """

    def __call__(
        self, x_TD: Tensor, weight_ED: Tensor, *, cap: float | None, top_k: int, scores: Scores, renormalize: bool
    ) -> Routed:
        """Differentiable in x and weight, each gradient in its own dtype; deterministic; waits for no device.

        Raises KernelError if the shapes do not fit, or top_k is not in 1..E.
        """


def choose_router(wanted: str, device: torch.device) -> Router:
    """The implementation named `wanted`, or the fastest measured on such a device ("auto"). Raises KernelError."""
    if choose("router", wanted, device) == "triton":
        from megagrok.kernels.router.kernel import route as triton_route

        return triton_route
    from megagrok.kernels.router.torch_ops import route

    return route


def check_shapes(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> None:
    """What every fast implementation asks at its door. Raises KernelError."""
    if x_TD.dim() != 2 or weight_ED.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise KernelError(
            f"router needs x [tokens, hidden] and weight [experts, hidden], got {list(x_TD.shape)} and "
            f"{list(weight_ED.shape)}."
        )
    if not 1 <= top_k <= len(weight_ED):
        raise KernelError(f"router has {len(weight_ED)} experts, so top_k must be in 1..{len(weight_ED)}, got {top_k}.")
