"""How a run begins and ends: what it says, what it leaves, how it is stopped, and who may start its ranks."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tolerance

from megagrok.errors import EXIT_PREEMPTED, EXIT_TRANSIENT
from megagrok.train.files import RunFiles
from tests.train.commands import Command, Done, lines, losses, run, steps_in, wait_until
from tests.train.conftest import CONFIGS, Untouched

TWO_RANKS = ("parallel.expert=2", "parallel.data=2")
MEGAGROK = (sys.executable, "-m", "megagrok")


def test_four_ranks_and_one_rank_learn_the_same(untouched: Untouched, alone: Untouched) -> None:
    assert losses(untouched.files) == pytest.approx(losses(alone.files), rel=0, abs=tolerance.LAYOUT_LOSS)


def test_the_summary_says_what_was_learnt_and_where_everything_lies(alone: Untouched) -> None:
    out, folder = alone.done.out, alone.files.root.parents[1]
    held_out = losses(alone.files)
    first, last = held_out["evaluation", 0], held_out["evaluation", 8]
    assert "law: 8 steps done.\n" in out
    assert f"  held-out loss        {first:.3f} -> {last:.3f} (step 0 -> 8)\n" in out
    assert re.search(r"  held-out perplexity  \d[\d,.]* -> \d[\d,.]*\n", out)
    assert "\nA sample of its text:\n  | def " in out
    for name in ("checkpoint", "metrics", "report"):
        found = re.search(rf"^  {name} +(.+)$", out, re.MULTILINE)
        assert found and (folder / found[1]).exists()
    assert re.search(r"^  W&B +my runs/law/wandb \(offline\)$", out, re.MULTILINE)
    assert len(list(alone.files.root.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert "<svg" in alone.files.report.read_text(encoding="utf-8")


def test_the_command_that_the_summary_gives_goes_on_with_the_run(alone: Untouched) -> None:
    # Last of those that read this run: it grows here.
    found = re.search(r"^  resume +megagrok (.+)$", alone.done.out, re.MULTILINE)
    assert found
    before = lines(alone.files)
    done = run(*shlex.split(found[1]), "telemetry.wandb=off", folder=alone.files.root.parents[1])
    assert "resuming from my runs/law/checkpoints/step-00000008 (step 8)" in done.err
    assert steps_in(alone.files) == list(range(1, 17))
    assert lines(alone.files)[: len(before)] == before


def test_a_stop_while_data_is_prepared_ends_the_command_at_once(config: Path, tmp_path: Path) -> None:
    much = "data.sources=[{kind: python_stdlib, max_bytes: 40000000}]"
    command = Command("train", config, *TWO_RANKS, much, "data.cache=cache", folder=tmp_path)
    # Its first child prepares the data, for half a minute.
    wait_until(lambda: command.ranks() != [], command)
    command.signal(signal.SIGTERM)
    done = command.wait(limit_seconds=8)
    assert (done.status, done.out) == (EXIT_PREEMPTED, ""), done.err
    assert not (tmp_path / "runs").exists()
    assert command.survivors() == []


def test_stops_at_bad_moments_lose_nothing(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    command = Command("train", config, *TWO_RANKS, "train.steps=5", folder=tmp_path)
    wait_until(lambda: len(command.ranks()) == 2, command)
    command.signal(signal.SIGTERM)
    # A rank that has not taken over its signals yet dies of them, which a scheduler answers in the same way.
    assert command.wait().status in (EXIT_PREEMPTED, EXIT_TRANSIENT)
    assert command.survivors() == []

    command = Command("train", config, *TWO_RANKS, "train.steps=5", folder=tmp_path)
    wait_until(lambda: 3 in steps_in(files), command)
    command.signal(signal.SIGTERM)
    time.sleep(0.05)
    command.signal(signal.SIGTERM)
    done = command.wait()
    # The second one kills, in the middle of a save or not, unless all had ended before.
    assert done.status in (EXIT_PREEMPTED, EXIT_TRANSIENT)
    assert ("a second signal (SIGTERM) came" in done.err) == (done.status == EXIT_TRANSIENT)
    assert command.survivors() == []

    run("train", config, *TWO_RANKS, "train.steps=5", folder=tmp_path)
    assert steps_in(files) == [1, 2, 3, 4, 5]


def placed(config: Path, folder: Path, *settings: str, num_ranks: int = 2) -> list[Command]:
    """Ranks as torchrun starts them: processes that know their place from the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
    return [
        Command(
            *("train", config, *settings),
            folder=folder,
            environment=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]


def test_ranks_that_a_launcher_started_train_stop_and_resume_like_forked_ones(
    config: Path, tmp_path: Path, untouched: Untouched
) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    first, second = placed(config, tmp_path, *TWO_RANKS)
    wait_until(lambda: 3 in steps_in(files), first)
    # One rank is told, all of them stop.
    second.signal(signal.SIGTERM)
    stopped = [first.wait(), second.wait()]
    assert [done.status for done in stopped] == [EXIT_PREEMPTED] * 2
    ended = [command.wait() for command in placed(config, tmp_path, *TWO_RANKS)]
    assert [done.status for done in ended] == [0, 0], ended
    assert "resuming from runs/law/checkpoints/step-" in ended[0].err
    for talker, silent in (stopped, ended):
        assert talker.err and not (silent.err or silent.out)
    assert losses(files) == pytest.approx(losses(untouched.files), rel=0, abs=tolerance.LAYOUT_LOSS)
    left, right = ({path.name for path in run.root.iterdir()} for run in (files, untouched.files))
    assert left == right


def test_a_placed_rank_whose_peer_dies_says_so_and_asks_to_be_started_again(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    first, second = placed(config, tmp_path, *TWO_RANKS)
    wait_until(lambda: 2 in steps_in(files), first)
    second.signal(signal.SIGKILL)
    done = first.wait(limit_seconds=20)
    assert second.wait().status == -signal.SIGKILL
    assert done.status == EXIT_TRANSIENT, done.err
    assert "RankError: rank 0 of 2 lost a peer: " in done.err and "Traceback" not in done.err


def test_what_one_placed_rank_finds_out_is_said_once_and_ends_all(config: Path, tmp_path: Path) -> None:
    first, second = placed(config, tmp_path, *TWO_RANKS, "train.evaluate_samples=4000")
    said, silent = first.wait(), second.wait()
    assert (said.status, silent.status) == (3, 3)
    assert said.err.startswith("DataError: train.evaluate_samples = 4,000: ")
    assert (silent.out, silent.err) == ("", "")


def test_a_launcher_that_starts_another_number_of_ranks_is_refused(config: Path, tmp_path: Path) -> None:
    for command in placed(config, tmp_path, "parallel.data=4", "train.batch_ramp=[]"):
        done = command.wait()
        assert done.status == 2, done
        assert re.search(r"4 .*2|2 .*4", done.err) and "Traceback" not in done.err, done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_starts_the_ranks(config: Path, tmp_path: Path, untouched: Untouched) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, "-m", "megagrok", "train", str(config), *TWO_RANKS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    files = RunFiles(tmp_path / "runs" / "law")
    assert losses(files) == pytest.approx(losses(untouched.files), rel=0, abs=tolerance.LAYOUT_LOSS)
    assert done.stdout.count("law: 8 steps done.") == 1


@pytest.mark.slow
def test_a_user_sees_only_lines_of_megagrok_and_ranks_are_forked_from_one_thread(config: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    command = subprocess.Popen(
        [*MEGAGROK, "train", str(config), *TWO_RANKS, "train.steps=5"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    files, threads = RunFiles(tmp_path / "runs" / "law"), Path(f"/proc/{command.pid}/task")
    while not steps_in(files):
        assert command.poll() is None
        time.sleep(0.01)
    # OpenMP's threads do not survive a fork. They bear the name of the process; others have one of their own.
    names = [(thread / "comm").read_text() for thread in threads.iterdir()]
    assert names.count((threads.parent / "comm").read_text()) == 1, names
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0
    assert all(line.startswith("step ") for line in err.splitlines()), err
    assert out.startswith("\nlaw: 5 steps done.\n"), out


def test_check_and_describe_answer_without_torch() -> None:
    code = (
        "import sys\nfrom megagrok.cli import main\n"
        f"assert main(['check', {str(CONFIGS / 'run' / 'tiny.yaml')!r}]) == 0\n"
        f"assert main(['describe', {str(CONFIGS / 'run' / 'tiny.yaml')!r}]) == 0\n"
        "print(sorted({'torch', 'numpy', 'megatron', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("\n[]\n")


def test_the_status_of_a_command_is_that_of_its_process(tmp_path: Path) -> None:
    done: Done = run("resume", "nothing", "--debug", folder=tmp_path, status=4)
    assert "Traceback" in done.err
