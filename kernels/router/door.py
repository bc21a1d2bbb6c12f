"""What goes into every implementation of the router, and what comes out."""
# T tokens, D hidden, E experts, K top-k

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megagrok.errors import KernelError

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


def check_shapes(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> None:
    """x [T, D], weight [E, D], K of 1..E. Raises KernelError."""
    if x_TD.dim() != 2 or weight_ED.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise KernelError(
            f"router needs x [tokens, hidden] and weight [experts, hidden], got {list(x_TD.shape)} and "
            f"{list(weight_ED.shape)}."
        )
    if not 1 <= top_k <= len(weight_ED):
        raise KernelError(f"router has {len(weight_ED)} experts, so top_k must be in 1..{len(weight_ED)}, got {top_k}.")
