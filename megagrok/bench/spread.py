"""A number that was measured several times, as median and extremes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def in_words(self, form: str = "{:,.0f}") -> str:
        """Median, and (lowest to highest)."""
        return f"{form.format(self.median)} ({form.format(self.min)} to {form.format(self.max)})"
