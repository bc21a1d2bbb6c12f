"""Laws of throughput."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.telemetry.throughput import measure_throughput

positive = st.floats(1e-3, 1e15)


@given(st.integers(1, 10**9), positive, positive, positive)
def test_tokens_and_mfu_give_back_the_work_of_the_step(tokens: int, seconds: float, flops: float, peak: float) -> None:
    speed = measure_throughput(tokens=tokens, step_seconds=seconds, flops_per_token=flops, peak_flops_per_second=peak)
    assert speed.tokens_per_second * seconds == pytest.approx(tokens)
    assert speed.mfu is not None
    assert speed.mfu * peak * seconds == pytest.approx(tokens * flops)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    speed = measure_throughput(tokens=100, step_seconds=0.5, flops_per_token=1e6, peak_flops_per_second=None)
    assert (speed.tokens_per_second, speed.mfu) == (200.0, None)
