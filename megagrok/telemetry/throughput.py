"""Speed of a step in the two numbers that people compare. The FLOPs of a token and the MFU formula live in `plan`."""

from dataclasses import dataclass

from megagrok.plan.flops import mfu


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """How fast one step was."""

    tokens_per_second: float
    """Over all ranks."""
    mfu: float | None
    """Fraction of the peak of all devices together; None where the peak is not known."""


def measure_throughput(
    *, tokens: int, step_seconds: float, flops_per_token: float, peak_flops_per_second: float | None
) -> Throughput:
    """The speed of a step of `tokens` tokens, over all ranks, that took `step_seconds`.

    step_seconds: wall time between two device syncs.  flops_per_token: plan.flops.training_flops_per_token.
    peak_flops_per_second: of all devices together, not of one; None if unknown.
    A step of no measurable time, or on devices without a peak, is a bug of ours: both are asserted to be positive.
    """
    assert step_seconds > 0, f"a step took {step_seconds} s"
    assert peak_flops_per_second is None or peak_flops_per_second > 0, f"a peak of {peak_flops_per_second} FLOP/s"
    tokens_per_second = tokens / step_seconds
    if peak_flops_per_second is None:
        return Throughput(tokens_per_second=tokens_per_second, mfu=None)
    return Throughput(
        tokens_per_second=tokens_per_second,
        mfu=mfu(tokens_per_second, flops_per_token, peak_flops_per_second),
    )
