"""A run that was stopped, killed or moved goes on as if nothing had happened: the same losses, the same bits."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import tolerance

from megagrok.errors import EXIT_PREEMPTED, EXIT_TRANSIENT
from megagrok.train.files import RunFiles
from tests.train.commands import Command, assert_same_run, copy_until, lines, losses, run, steps_in, wait_until
from tests.train.conftest import FOUR_RANKS, Untouched

STEPS = 8


def start(config: Path, folder: Path, *settings: str) -> tuple[Command, RunFiles]:
    return Command("train", config, *FOUR_RANKS, *settings, folder=folder), RunFiles(folder / "runs" / "law")


def assert_finishes_as(untouched: Untouched, config: Path, folder: Path, resumed_from: int) -> None:
    """The same command again ends the run, having said where it began, and nothing differs."""
    done = run("train", config, *FOUR_RANKS, folder=folder)
    files = RunFiles(folder / "runs" / "law")
    assert f"resuming from runs/law/checkpoints/step-{resumed_from:08d} (step {resumed_from})" in done.err
    assert_same_run(files, untouched.files, STEPS)


def test_the_untouched_run_has_each_step_and_evaluation_once(untouched: Untouched) -> None:
    records = [(line["kind"], line["step"]) for line in lines(untouched.files)]
    assert sorted(records) == sorted(
        [("step", step) for step in range(1, 9)] + [("evaluation", step) for step in (0, 2, 4, 6, 8)]
    )
    batches = [line["global_batch"] for line in lines(untouched.files) if line["kind"] == "step"]
    assert batches == [2, 2, 2, 2, 2, 4, 4, 4]
    assert "resuming" not in untouched.done.err


def test_a_run_that_is_stopped_twice_is_the_same_run_bit_by_bit(
    config: Path, tmp_path: Path, untouched: Untouched
) -> None:
    saved = 0
    for number, after in ((signal.SIGUSR1, 3), (signal.SIGINT, 5)):
        # Nothing but the stop saves.
        command, files = start(config, tmp_path, "checkpoint.every_steps=100")
        wait_until(lambda files=files, after=after: after in steps_in(files), command)
        command.signal(number)
        done = command.wait()
        assert done.status == EXIT_PREEMPTED, done.err
        assert (f"(step {saved})\n" in done.err) == (saved > 0)
        saved = max(steps_in(files))
        assert after <= saved < STEPS
        assert f"stopped; step {saved} is saved. Go on with: megagrok resume runs/law\n" in done.err
        assert command.survivors() == []
    assert_finishes_as(untouched, config, tmp_path, saved)


def kill_a_rank(command: Command, random_: random.Random) -> int:
    ranks = command.ranks()
    assert len(ranks) == 4
    victim = random_.randrange(4)
    os.kill(ranks[victim], signal.SIGKILL)
    return victim


def assert_told(command: Command, victim: int) -> None:
    killed_at = time.monotonic()
    done = command.wait()
    assert time.monotonic() - killed_at < 10
    assert done.status == EXIT_TRANSIENT, done.err
    assert f"RankError: rank {victim} of 4 was killed by SIGKILL at " in done.err
    assert "Traceback" not in done.err
    assert command.survivors() == []


def test_a_run_whose_ranks_are_killed_is_the_same_run_bit_by_bit(
    config: Path, tmp_path: Path, untouched: Untouched
) -> None:
    random_ = random.Random(1)
    # Between two saves, then in the middle of one, or within a moment after it.
    command, files = start(config, tmp_path)
    wait_until(lambda: 3 in steps_in(files), command)
    assert_told(command, kill_a_rank(command, random_))
    command, files = start(config, tmp_path)
    wait_until(lambda: any(files.checkpoints.glob("step-00000004*")), command)
    assert_told(command, kill_a_rank(command, random_))
    newest = max(int(path.name.removeprefix("step-")) for path in files.checkpoints.glob("step-????????"))
    assert_finishes_as(untouched, config, tmp_path, newest)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_rank_may_die_at_any_time(config: Path, tmp_path: Path, untouched: Untouched, seed: int) -> None:
    random_ = random.Random(seed)
    command, files = start(config, tmp_path)
    wait_until(lambda: len(command.ranks()) == 4, command)
    time.sleep(random_.uniform(0.0, 5.0))
    if len(command.ranks()) == 4:
        assert_told(command, kill_a_rank(command, random_))
    done = run("train", config, *FOUR_RANKS, folder=tmp_path)
    assert done.status == 0
    assert_same_run(files, untouched.files, STEPS)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.zero=0",), id="one rank that shards nothing"),
        pytest.param(("parallel.expert=2", "parallel.data=2"), id="expert 2 over data 2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("F29")
def test_a_run_goes_on_in_another_layout(
    config: Path, tmp_path: Path, untouched: Untouched, layout: tuple[str, ...]
) -> None:
    files = copy_until(untouched.files, 4, tmp_path / "runs")
    done = run("train", config, *layout, folder=tmp_path)
    assert "resuming from runs/law/checkpoints/step-00000004 (step 4)" in done.err
    expected, actual = losses(untouched.files), losses(files)
    assert actual.keys() == expected.keys()
    assert actual == pytest.approx(expected, rel=0, abs=tolerance.LAYOUT_LOSS)
