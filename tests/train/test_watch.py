"""A rank that hangs is found from outside, with its name, its phase and every rank's stack; and every start is on
record. Through the real command, with ranks that are really stopped and killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megagrok.errors import EXIT_PREEMPTED, EXIT_TRANSIENT, CheckpointError
from megagrok.parallel.placement import Nodes
from megagrok.train.attempt import Attempt, Ending, read_attempts
from megagrok.train.files import RunFiles
from megagrok.train.lease import leased, read_lease
from tests.train.commands import Command, assert_same_run, run, steps_in, wait_until
from tests.train.conftest import FOUR_RANKS, Untouched

LIMIT_SECONDS = 3.0
LIMITS = (f"watch.step_seconds={LIMIT_SECONDS}", f"watch.evaluate_seconds={LIMIT_SECONDS}")


def last(files: RunFiles) -> tuple[Attempt, Ending]:
    attempt = read_attempts(files.root)[-1]
    assert attempt.ending is not None
    return attempt, attempt.ending


def test_a_rank_that_hangs_is_named_with_every_stack_and_the_run_goes_on_from_its_save(
    config: Path, untouched: Untouched, tmp_path: Path
) -> None:
    command = Command("train", config, *FOUR_RANKS, *LIMITS, folder=tmp_path)
    files = RunFiles(tmp_path / "runs" / "law")
    wait_until(lambda: 5 in steps_in(files), command)
    victim = 2
    pid = command.ranks()[victim]
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    done = command.wait()
    assert time.monotonic() - stopped_at < LIMIT_SECONDS + 6
    assert done.status == EXIT_TRANSIENT
    assert command.survivors() == []
    assert f"rank {victim} hangs in " in done.err and "stopped by a signal" in done.err
    _, ending = last(files)
    assert (ending.exit_code, ending.rank, ending.is_node_suspect) == (EXIT_TRANSIENT, victim, True)
    assert ending.phase in ("step", "evaluate", "save") and ending.step in (5, 6, 7)
    stacks = (files.root / "attempts" / "00001" / "stacks-node-000.txt").read_text()
    for rank in range(4):
        assert f"rank {rank}\n" in stacks
    assert stacks.count("in train_rank") == 4, stacks
    run("train", config, *FOUR_RANKS, folder=tmp_path)
    assert_same_run(files, untouched.files, 8)


def test_a_rank_that_is_killed_is_on_the_page_of_its_start(config: Path, tmp_path: Path) -> None:
    command = Command("train", config, *FOUR_RANKS, folder=tmp_path)
    files = RunFiles(tmp_path / "runs" / "law")
    wait_until(lambda: 3 in steps_in(files), command)
    os.kill(command.ranks()[1], signal.SIGKILL)
    assert command.wait().status == EXIT_TRANSIENT
    attempt, ending = last(files)
    assert attempt.generation == 1 and len(attempt.nodes) == 1
    assert (ending.rank, ending.error, ending.is_node_suspect) == (1, "RankError", True)
    assert "was killed by SIGKILL" in ending.message
    assert attempt.furthest_step >= 3


def test_every_start_has_a_generation_and_a_page_that_says_how_it_ended(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    command = Command("train", config, folder=tmp_path)
    wait_until(lambda: 2 in steps_in(files), command)
    command.signal(signal.SIGUSR1)
    assert command.wait().status == EXIT_PREEMPTED
    run("train", config, folder=tmp_path)
    first, second = read_attempts(files.root)
    assert first.ending is not None and second.ending is not None
    assert (first.generation, first.ending.exit_code) == (1, EXIT_PREEMPTED)
    assert (second.generation, second.ending.exit_code, second.ending.rank) == (2, 0, None)
    assert second.ending.saved_step == 8 and first.ending.saved_step == first.ending.step


def test_a_start_whose_holder_was_not_heard_for_long_is_not_kept_out(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    with leased(files, Nodes()):
        pass
    elsewhere = json.loads(files.lease.read_text()) | {"released": False, "machine": "another", "beat_at": time.time()}
    files.lease.write_text(json.dumps(elsewhere | {"beat_at": time.time() - 60}))
    with leased(files, Nodes()) as lease:
        assert lease.generation == 2


def test_the_same_job_started_again_takes_over_at_once_and_the_old_start_knows(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    with leased(files, Nodes(job="7")) as old, leased(files, Nodes(job="7", restart=1)) as new:
        assert (old.generation, new.generation) == (1, 2)
        new.check()
        with pytest.raises(Exception, match=r"held by start 2 .*this is start 1, which was thought dead"):
            old.check()
        # What the old one does at its end is nothing.
    holder = read_lease(files.lease)
    assert holder is not None and (holder.generation, holder.released) == (2, True)


def test_a_start_that_was_overtaken_finds_out_when_it_says_that_it_lives_and_writes_over_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagrok.train.lease.REFRESH_SECONDS", 0.0)
    files = RunFiles(tmp_path / "run")
    with leased(files, Nodes(job="7")) as old:
        before = read_lease(files.lease)
        old.refresh()
        after = read_lease(files.lease)
        assert before is not None and after is not None and after.beat_at > before.beat_at
        with leased(files, Nodes(job="7", restart=1)):
            with pytest.raises(CheckpointError, match="held by start 2"):
                old.refresh()
            old.release()
            holder = read_lease(files.lease)
            assert holder is not None and (holder.generation, holder.released) == (2, False)


def test_a_lease_that_cannot_be_read_for_a_moment_ends_no_run_and_commits_nothing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    with leased(files, Nodes()) as lease:
        text = files.lease.read_text()
        files.lease.write_text(text[:20])
        lease.refresh()
        with pytest.raises(CheckpointError, match="held by nobody"):
            lease.check()
        assert files.lease.read_text() == text[:20]
        files.lease.write_text(text)
        lease.check()
