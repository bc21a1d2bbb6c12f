"""How often to save: too often costs steps, too seldom costs what a failure takes back. Exact, for random failures.

ETTR, the effective training time ratio, is the time of steps that count over all time: what is lost is holding steps
for saves, steps that are made again, and the way back to training. Waiting in a queue for other jobs is not counted.

The model is J. T. Daly's complete one (Future Generation Computer Systems 22, 2006): failures come at any time, during
saves and restarts too; here a save also needs a while in the background before it counts. With T seconds of
steps between saves, H a save holds the steps, W until it counts, R from a failure to the next step, M between failures:

    ETTR(T) = T / (M exp((R + W) / M) (exp((T + H) / M) - 1))

A start lives M on average and commits each segment of T + H that it outlives by W: exp(-W/M) / (exp((T+H)/M) - 1) of
them. A start costs M exp(R/M), since a restart can fail, too. The quotient is the line above. To first order it is
1 - H/T - (T/2 + R + W) / M, whose maximum is Young's sqrt(2 H M) (Communications of the ACM 17, 1974).
"""

import math
from dataclasses import dataclass

_NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class Losses:
    """What failures and saves cost, in seconds: the letters of the module's formula."""

    mtbf: float
    hold: float
    write: float
    recovery: float


@dataclass(frozen=True, slots=True)
class Interval:
    """The best time of steps between two saves."""

    steps: int
    seconds: float
    """Of those steps."""
    ettr: float
    unrounded_seconds: float
    """The best, were a step divisible and a save in place at once."""
    young_seconds: float
    """The first-order answer to that."""

    @property
    def young_error(self) -> float:
        """How far the first-order answer is off, as a share; grows as failures come less far apart than saves are
        long."""
        return self.young_seconds / self.unrounded_seconds - 1 if self.unrounded_seconds else 0.0


def ettr(work_seconds: float, losses: Losses) -> float:
    """Effective training time ratio with saves after every `work_seconds` of steps.

    A save waits for the one before, so nothing is gained by a T + H below W: the longer counts.
    """
    mtbf = losses.mtbf
    segment = max(work_seconds + losses.hold, losses.write)
    exponent = (losses.recovery + losses.write + segment) / mtbf
    if exponent > 700:
        return 0.0
    # exp(a) (exp(b) - 1), without losing the digits of a small b.
    return work_seconds / (mtbf * math.exp(exponent) * -math.expm1(-segment / mtbf))


def young_interval(losses: Losses) -> float:
    """Seconds of steps between saves that lose least, to first order in H / M."""
    return math.sqrt(2 * losses.hold * losses.mtbf)


def best_seconds(losses: Losses) -> float:
    """Seconds of steps between saves that lose least; exact.

    The root of 1 - x = exp(-x - h), with x = T / M and h = H / M, where the derivative of ETTR vanishes. W and R do
    not matter to it: they cost the same however often the run saves.
    """
    hold = losses.hold / losses.mtbf
    # Right of the root, where the concave function falls: Newton's steps go down to it and never past it.
    x = min(1.0, math.sqrt(2 * hold))
    for _ in range(_NEWTON_STEPS):
        slope = -math.expm1(-x - hold)
        if x == 0 or slope >= x:
            break
        x += (slope - x) / slope
    return x * losses.mtbf


def best_interval(step_seconds: float, losses: Losses) -> Interval:
    """In whole steps, since a run saves between two of them, and at least as many as a save needs to be in place."""
    best = best_seconds(losses)
    wanted = max(best, losses.write - losses.hold) / step_seconds
    steps = max({max(1, math.floor(wanted)), max(1, math.ceil(wanted))}, key=lambda n: ettr(n * step_seconds, losses))
    return Interval(steps, steps * step_seconds, ettr(steps * step_seconds, losses), best, young_interval(losses))
