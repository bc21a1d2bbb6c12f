"""Laws of the stopwatch: who runs when, what a ratio is, what counts as kept."""

import time

import pytest
import torch
from torch import nn

from megagrok.kernels.timing import Case, Race, Timing, race, saved_activation_bytes
from megagrok.platform import CPU


def _case(makes) -> Case:  # type: ignore[no-untyped-def]
    return Case("toy", "4 rows", 8.0, 0.0, makes)


def test_every_round_runs_all_and_the_order_rotates() -> None:
    ran: list[str] = []

    def make(name: str):  # type: ignore[no-untyped-def]
        def run() -> None:
            ran.append(name)
            time.sleep(0.002)

        return lambda: run

    result = race(_case({name: make(name) for name in "abc"}), CPU, most_rounds=3, sample_seconds=0.0)
    assert [len(timing.seconds) for timing in result.timings.values()] == [3, 3, 3]
    assert ran[-9:] == list("abcbcacab")


def test_a_round_that_is_slow_for_all_changes_no_ratio() -> None:
    fast, slow = Timing((1.0, 50.0, 1.0, 1.0), 0), Timing((2.0, 100.0, 2.0, 2.0), 0)
    assert Race(_case({}), {"fast": fast, "slow": slow}, {}).ratio("fast", "slow") == pytest.approx(2.0)


def test_a_short_run_is_repeated_until_it_lasts() -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)

    result = race(_case({"a": lambda: run}), CPU, most_rounds=1)
    assert count > 10
    assert 0.001 <= result.timings["a"].median < 0.01


def test_kept_bytes_are_the_activations_once_each_and_no_parameter() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def run() -> None:
        x = torch.randn(4, 8, requires_grad=True)
        hidden = x @ weight.t()  # keeps x and the weight
        (hidden * hidden).sum().backward()  # keeps hidden twice

    assert saved_activation_bytes(run) == 2 * 4 * 8 * 4
    assert weight.grad is not None


def test_kept_bytes_are_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            x = torch.randn(16, requires_grad=True)
            (x * x).sum().backward()

    assert saved_activation_bytes(run) == 16 * 4


def test_rounds_end_with_the_budget_but_are_three_at_least() -> None:
    def run() -> None:
        time.sleep(0.01)

    case = _case({"a": lambda: run})
    assert len(race(case, CPU, budget_seconds=0.0).timings["a"].seconds) == 3
    assert 5 <= len(race(case, CPU, budget_seconds=0.2, sample_seconds=0.0).timings["a"].seconds) <= 15


def test_whoever_may_fail_is_left_out_with_its_words_and_others_raise() -> None:
    def run() -> None:
        raise ValueError("no such shape\nsecond line")

    case = _case({"peer": lambda: run, "ours": lambda: lambda: None})
    result = race(case, CPU, may_fail={"peer"})
    assert list(result.timings) == ["ours"]
    assert result.failed == {"peer": "ValueError: no such shape"}
    with pytest.raises(ValueError, match="no such shape"):
        race(case, CPU)
