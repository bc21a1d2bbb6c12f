"""How evenly the tokens of a step fall on the experts. Arithmetic on counts that are already reduced over ranks."""

from collections.abc import Sequence

SHARE_DECIMALS = 6
"""Shares are rounded to this: 64 layers of 8 experts then take 5 kB of a line of metrics instead of 10."""


def expert_shares(tokens_per_expert: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Fraction of each layer's (token, choice) pairs that went to each expert.

    tokens_per_expert: counts [L, E] of one step over all ranks, as Python integers.
    Returns [L, E]; each layer sums to 1 up to rounding, or is all 0 when nothing was routed.
    """
    return tuple(_layer_shares(counts) for counts in tokens_per_expert)


def _layer_shares(counts: Sequence[int]) -> tuple[float, ...]:
    total = sum(counts)
    if total == 0:
        return (0.0,) * len(counts)
    return tuple(round(count / total, SHARE_DECIMALS) for count in counts)


def imbalance(shares: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Largest over mean load of each layer: 1 is even, E is every token to one expert, 0 is no token at all.

    shares: [L, E] from `expert_shares`.  Returns [L].
    Source: the max-over-mean load of GShard's capacity factor (Lepikhin et al. 2020, sec. 2.2): the factor that a layer
    would need to drop no token.
    """
    return tuple(_layer_imbalance(layer) for layer in shares)


def _layer_imbalance(layer: Sequence[float]) -> float:
    total = sum(layer)
    return max(layer) * len(layer) / total if total > 0 else 0.0
