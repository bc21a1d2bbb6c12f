"""How many more tokens than the mean the fullest expert rank gets. An estimate: no rank's load is known before the run.

Two sources of skew. Sampling: with N choices falling on r ranks alike, a rank's share is binomial. Habit: a router
under a balance loss still prefers some experts. Both are taken as normal and independent between experts; the fullest
of r ranks is the quantile of the largest of r.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from megagrok.plan.constants import EXPERT_SPREAD


@dataclass(frozen=True, slots=True)
class Skew:
    """Rows of the fullest expert rank over the mean, minus 1: in the median micro-batch, and in one of a hundred."""

    p50: float
    p99: float


EVEN = Skew(0.0, 0.0)


@lru_cache(maxsize=4096)
def skew(experts: int, top_k: int, expert_ranks: int, choices: float) -> Skew:
    """Of a group of `expert_ranks` that share `experts` out and route `choices` (tokens x top_k) in one micro-batch.

    Layers are skewed independently: over n of them together the skew is 1 / sqrt(n) of it.
    """
    if expert_ranks == 1:
        return EVEN
    local = experts / expert_ranks
    share = 1 / expert_ranks
    sampling = (1 - share) / (choices * share)
    habit = EXPERT_SPREAD**2 / local * (1 - share)
    spread = math.sqrt(sampling + habit)
    # No rank gets more than all of its experts can: each token visits an expert once.
    most = min(expert_ranks, experts / top_k) - 1
    p50, p99 = (min(most, spread * _largest_of(expert_ranks, quantile)) for quantile in (0.5, 0.99))
    return Skew(p50, p99)


@lru_cache(maxsize=256)
def _largest_of(count: int, quantile: float) -> float:
    """Standard deviations above the mean of the largest of `count` normal values, at a quantile."""
    return NormalDist().inv_cdf(quantile ** (1 / count))
