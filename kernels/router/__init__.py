"""Which experts a token visits, with which weights, and what its auxiliary losses are made of.

Which implementation: `choose_router`, once, when a model is built.
"""
# T tokens, D hidden, E experts, K top-k

from typing import Protocol

import torch
from torch import Tensor

from megagrok.kernels.choice import choose
from megagrok.kernels.router.door import Routed, Scores

__all__ = ["Routed", "Router", "Scores", "choose_router"]


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
