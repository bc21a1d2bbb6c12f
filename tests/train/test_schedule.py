"""Laws of the learning rate, over schedules drawn at random."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.config.schema import ScheduleConfig
from megagrok.train.schedule import learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, float, int]:
    """A schedule whose warm-up and decay fit into the run, its peak, and the run's steps."""
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total - 1))
    peak = draw(st.floats(1e-6, 1e-1))
    config = ScheduleConfig(
        kind=draw(st.sampled_from(["constant", "wsd", "cosine"])),
        warmup_steps=warmup,
        decay_steps=draw(st.integers(0, total - warmup)),
        min_lr=peak * draw(st.floats(0, 1)),
    )
    return config, peak, total


def rates(config: ScheduleConfig, peak: float, total: int) -> list[float]:
    return [learning_rate(step, peak=peak, schedule=config, total_steps=total) for step in range(1, total + 1)]


@given(schedules())
def test_the_rate_is_positive_at_first_and_never_above_the_peak(case: tuple[ScheduleConfig, float, int]) -> None:
    config, peak, total = case
    curve = rates(config, peak, total)
    assert all(0.0 <= rate <= peak for rate in curve)
    if total > 1 and config.decay_steps < total:
        assert curve[0] > 0.0


@given(schedules())
def test_the_warm_up_is_a_straight_line_that_ends_at_the_peak(case: tuple[ScheduleConfig, float, int]) -> None:
    config, peak, total = case
    curve = rates(config, peak, total)
    for step in range(1, config.warmup_steps + 1):
        assert curve[step - 1] == pytest.approx(peak * step / config.warmup_steps)
    if config.warmup_steps:
        assert curve[config.warmup_steps - 1] == pytest.approx(peak)


@given(schedules())
def test_after_the_warm_up_the_rate_never_rises(case: tuple[ScheduleConfig, float, int]) -> None:
    config, peak, total = case
    after = rates(config, peak, total)[max(0, config.warmup_steps - 1) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))


@given(schedules())
def test_the_last_step_uses_the_minimum_unless_nothing_decays(case: tuple[ScheduleConfig, float, int]) -> None:
    config, peak, total = case
    decays = config.kind == "cosine" or (config.kind == "wsd" and config.decay_steps > 0)
    assert rates(config, peak, total)[-1] == (config.min_lr if decays else peak)


@given(schedules())
def test_the_rate_does_not_jump(case: tuple[ScheduleConfig, float, int]) -> None:
    """No two steps differ by more than the steepest piece allows: 1/W, sqrt(1/D) or pi/2C of the height."""
    config, peak, total = case
    limits = [1 / config.warmup_steps if config.warmup_steps else 0.0]
    if config.kind == "wsd" and config.decay_steps:
        limits.append(math.sqrt(1 / config.decay_steps))
    if config.kind == "cosine":
        limits.append(math.pi / 2 / (total - config.warmup_steps))
    curve = rates(config, peak, total)
    assert all(abs(later - earlier) <= peak * max(limits) * (1 + 1e-9) for earlier, later in pairwise(curve))


@given(schedules())
def test_wsd_holds_the_peak_until_the_decay_starts(case: tuple[ScheduleConfig, float, int]) -> None:
    config, peak, total = case
    if config.kind == "wsd":
        curve = rates(config, peak, total)
        assert all(rate == peak for rate in curve[max(0, config.warmup_steps - 1) : total - config.decay_steps])


@given(schedules(), st.integers(1, 1000))
def test_beyond_the_end_the_rate_stays_where_it_ended(case: tuple[ScheduleConfig, float, int], extra: int) -> None:
    config, peak, total = case
    beyond = learning_rate(total + extra, peak=peak, schedule=config, total_steps=total)
    assert beyond == rates(config, peak, total)[-1]


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 200), st.sampled_from(["constant", "wsd", "cosine"]))
def test_a_schedule_longer_than_the_run_still_stays_below_the_peak(
    total: int, warmup: int, decay: int, kind: str
) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay)  # type: ignore[arg-type]
    assert all(0.0 <= rate <= 1e-3 for rate in rates(config, 1e-3, total))


def test_the_decay_has_the_published_shape() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=16, min_lr=0.1)
    curve = rates(config, 1.0, 100)
    # A quarter of the decay (4 of 16 steps) is half of the height: 1 - sqrt(1/4).
    assert curve[84 + 4 - 1] == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = rates(ScheduleConfig(kind="cosine", warmup_steps=20, min_lr=0.1), 1.0, 100)
    assert cosine[60 - 1] == pytest.approx(0.1 + 0.9 * 0.5)
