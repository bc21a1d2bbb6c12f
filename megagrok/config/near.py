"""The numbers near a number: where checks look for values that would work."""

import math
from functools import lru_cache

MOST_CANDIDATES = 12
LARGEST_SMALL_DIVISOR = 4096
"""Divisors are sought up to here, and their cofactors: enough for any layout, quick for any number."""


def divisors(number: int, near: int) -> list[int]:
    """Divisors of `number`, nearest to `near` first, the larger first of two that are as near."""
    return sorted(_divisors_of(number), key=lambda value: (abs(value - near), -value))[:MOST_CANDIDATES]


def multiples(step: int, near: int) -> list[int]:
    """The multiples of `step` on both sides of `near`, without 0."""
    below = near // step * step
    return [value for value in (below, below + step) if value > 0]


# A search for layouts asks for the divisors of a few numbers a hundred thousand times.
@lru_cache(maxsize=1024)
def _divisors_of(number: int) -> frozenset[int]:
    limit = min(math.isqrt(number), LARGEST_SMALL_DIVISOR)
    small = [value for value in range(1, limit + 1) if number % value == 0]
    return frozenset((*small, *(number // value for value in small)))
