"""How often to save: the formula against a simulation that knows no formula, and against its neighbours."""

import math
import random

import pytest

from megagrok.plan.checkpoint_interval import Losses, best_interval, best_seconds, ettr, young_interval

# From a small job to one that fails as often as it starts.
PLACES = [
    Losses(mtbf=180_000.0, hold=0.9, write=5.8, recovery=330.0),
    Losses(mtbf=11_000.0, hold=20.0, write=60.0, recovery=460.0),
    Losses(mtbf=1_400.0, hold=5.0, write=20.0, recovery=1_500.0),
    Losses(mtbf=600.0, hold=120.0, write=0.0, recovery=60.0),
]
ids = [f"M={losses.mtbf:g}" for losses in PLACES]


def simulate(work_seconds: float, losses: Losses, num_failures: int, seed: int) -> float:
    """ETTR of a job that lives through so many failures, event by event. A failure during a restart begins it anew."""
    draw = random.Random(seed)
    wall = counted = 0.0
    for _ in range(num_failures):
        life = draw.expovariate(1 / losses.mtbf)
        wall += life
        # A save that has begun but is not in place when the job dies was for nothing.
        saves = (life - losses.write) // (work_seconds + losses.hold)
        counted += max(0.0, saves) * work_seconds
        while (next_life := draw.expovariate(1 / losses.mtbf)) < losses.recovery:
            wall += next_life
        wall += losses.recovery
    return counted / wall


@pytest.mark.parametrize("losses", PLACES, ids=ids)
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_formula_says_what_a_simulated_job_achieves(losses: Losses, factor: float) -> None:
    work = max(factor * best_seconds(losses), losses.write - losses.hold)
    expected = ettr(work, losses)
    assert simulate(work, losses, 300_000, seed=1) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("losses", PLACES[1:], ids=ids[1:])
def test_the_best_interval_beats_its_neighbours_in_the_simulation(losses: Losses) -> None:
    best = max(best_seconds(losses), losses.write - losses.hold)
    # The same failures hit all three: common random numbers.
    achieved = [simulate(factor * best, losses, 100_000, seed=2) for factor in (0.5, 1.0, 2.0)]
    assert max(achieved) == achieved[1]


@pytest.mark.parametrize("hold", [1e-6, 1e-3, 1.0, 60.0, 1e4])
@pytest.mark.parametrize("mtbf", [30.0, 1e3, 1e5, 1e9])
def test_no_interval_is_better_than_the_best(mtbf: float, hold: float) -> None:
    losses = Losses(mtbf, hold, write=0.0, recovery=0.0)
    best = best_seconds(losses)
    assert 0 < best <= mtbf
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert ettr(best * factor, losses) <= ettr(best, losses)


def test_youngs_interval_is_the_best_one_where_failures_are_rare_and_too_long_where_they_are_not() -> None:
    errors = [young_interval(losses) / best_seconds(losses) - 1 for losses in PLACES]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.002
    assert errors[-1] > 0.15


def test_daly_published_the_same_optimum() -> None:
    """Figures 3 to 5 of his paper: dumps of 5 min, failures every 24 h, 6 h and 15 min."""
    found = [best_seconds(Losses(60 * minutes, 300.0, 0.0, 600.0)) / 60 for minutes in (1440, 360, 15)]
    assert found == [pytest.approx(117, abs=1), pytest.approx(57, abs=1), pytest.approx(9.1, abs=0.1)]


def test_waiting_for_the_save_before_is_no_gain() -> None:
    losses = Losses(mtbf=10_000.0, hold=0.1, write=100.0, recovery=300.0)
    assert best_seconds(losses) < losses.write
    found = best_interval(7.0, losses)
    assert found.seconds + losses.hold >= losses.write - 7.0
    assert found.ettr > ettr(best_seconds(losses), losses)


@pytest.mark.parametrize("step", [0.5, 11.0, 300.0, 370.0, 5_000.0])
def test_a_run_saves_after_whole_steps_and_no_other_number_of_them_is_better(step: float) -> None:
    losses = PLACES[1]
    found = best_interval(step, losses)
    assert found.seconds == found.steps * step
    assert found.ettr == max(ettr(steps * step, losses) for steps in range(1, found.steps + 200))


def test_a_job_that_never_lives_as_long_as_a_save_makes_no_progress_and_no_error() -> None:
    assert ettr(100.0, Losses(mtbf=1.0, hold=1.0, write=1e4, recovery=1e4)) == 0.0


def test_free_saves_that_are_in_place_at_once_leave_only_the_way_back() -> None:
    losses = Losses(mtbf=1e4, hold=0.0, write=0.0, recovery=500.0)
    found = best_interval(1e-3, losses)
    assert found.steps == 1
    assert found.ettr == pytest.approx(math.exp(-0.05), rel=1e-6)
    assert found.young_error == 0.0
