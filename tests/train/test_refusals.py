"""What cannot be trained is refused before a rank exists, and a run is never begun again behind anyone's back."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from megagrok.errors import EXIT_BUG
from megagrok.parallel.placement import Nodes
from megagrok.train.files import RunFiles
from megagrok.train.lease import leased, read_lease
from tests.train.commands import Command, copy_until, damage, lines, run, steps_in, tensors, wait_until
from tests.train.conftest import FOUR_RANKS, Untouched


@pytest.fixture
def copied(untouched: Untouched, tmp_path: Path) -> RunFiles:
    """The untouched run as it was after four of its eight steps."""
    return copy_until(untouched.files, 4, tmp_path / "runs")


def content(files: RunFiles) -> dict[str, bytes]:
    """Every file of a run, but for who holds it and who tried."""
    return {
        str(path.relative_to(files.root)): path.read_bytes()
        for path in files.root.rglob("*")
        if path.is_file() and path.parent != files.root / "attempts" / path.parent.name and "lease" not in path.name
    }


def test_another_run_in_the_same_folder_is_refused_with_every_difference(
    config: Path, copied: RunFiles, tmp_path: Path
) -> None:
    before = content(copied)
    changed = ("model.rope_theta=5000.0", "train.seed=9", "data.held_out_fraction=0.2", "optimizer.lr=0.02")
    done = run("train", config, *FOUR_RANKS, *changed, folder=tmp_path, status=4)
    assert done.err.startswith("CheckpointError: runs/law/checkpoints/step-00000004 belongs to another run:\n")
    assert "  data.held_out_fraction: the checkpoint has 0.1, the configuration 0.2\n" in done.err
    assert "  model.rope_theta: the checkpoint has 10000.0, the configuration 5000.0\n" in done.err
    assert "  train.seed: the checkpoint has 1234, the configuration 9\n" in done.err
    assert done.err.count("the checkpoint has") == 3
    assert content(copied) == before


def test_a_run_shorter_than_its_past_is_refused(config: Path, copied: RunFiles, tmp_path: Path) -> None:
    done = run("train", config, "train.steps=3", "schedule.decay_steps=1", folder=tmp_path, status=4)
    assert "step-00000004 has more steps behind it than train.steps = 3. Fix: train.steps=4 or more" in done.err


def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(config: Path, copied: RunFiles, tmp_path: Path) -> None:
    damage(next((copied.checkpoints / "step-00000004").glob("rank-*.safetensors")))
    done = run("train", config, "train.steps=4", folder=tmp_path)
    assert "checkpoints/step-00000002 (step 2)\n  passed over step-00000004: rank 0: " in done.err
    assert [line["step"] for line in lines(copied) if line["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize("is_short", [False, True], ids=["a bit turned", "a file cut short"])
def test_only_damaged_checkpoints_end_the_command_and_begin_no_run(
    config: Path, copied: RunFiles, tmp_path: Path, is_short: bool
) -> None:
    for shard in copied.checkpoints.glob("step-*/rank-00000.safetensors"):
        if is_short:
            shard.write_bytes(shard.read_bytes()[:-1])
        else:
            damage(shard)
    before = content(copied)
    done = run("train", config, "parallel.zero=1", folder=tmp_path, status=4)
    assert "none of 2 checkpoints is sound" in done.err
    after = content(copied)
    assert is_short <= (after == before)
    assert after["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    run("train", config, "train.steps=2", "schedule.decay_steps=0", folder=tmp_path)
    shutil.move(files.checkpoints, tmp_path / "moved")
    done = run("train", config, folder=tmp_path, status=4)
    assert "has no checkpoint, though an earlier start saved step 2 there: not starting from scratch" in done.err
    shutil.rmtree(files.checkpoints)
    shutil.move(tmp_path / "moved", files.checkpoints)
    assert "resuming from" in run("train", config, folder=tmp_path).err


def test_data_that_does_not_suffice_is_refused_before_the_run_has_a_folder(config: Path, tmp_path: Path) -> None:
    done = run("train", config, "train.evaluate_samples=4000", folder=tmp_path, status=3)
    assert re.search(
        r"DataError: train.evaluate_samples = 4,000: the \d+ held-out documents make [\d,]+ samples", done.err
    )
    assert not (tmp_path / "runs").exists()


def test_a_configuration_that_cannot_run_leaves_nothing(config: Path, tmp_path: Path) -> None:
    done = run("train", config, "parallel.expert=3", "optimizer.lr=-1.0", folder=tmp_path, status=2)
    assert done.err.startswith("ConfigError: ")
    assert "parallel.expert" in done.err and "optimizer.lr" in done.err
    assert not (tmp_path / "runs").exists()


def test_resume_wants_the_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for folder in ("nothing", "nowhere"):
        done = run("resume", folder, folder=tmp_path, status=4)
        assert done.err == f"CheckpointError: {folder} is not the folder of a run: it has no config.yaml\n"


@pytest.mark.parametrize("override", ["name=other", "runs_dir=elsewhere"])
def test_resume_does_not_wander_into_another_folder(copied: RunFiles, tmp_path: Path, override: str) -> None:
    done = run("resume", copied.root, override, folder=tmp_path, status=2)
    assert f"ConfigError: {override}: a run is resumed in its own folder" in done.err


def test_two_runs_do_not_share_a_folder(config: Path, copied: RunFiles, tmp_path: Path) -> None:
    before = content(copied)
    with leased(copied, Nodes()):
        done = run("train", config, folder=tmp_path, status=4)
    assert f"CheckpointError: runs/law is in use by process {os.getpid()} on " in done.err
    assert content(copied) == before


def test_a_killed_run_lets_go_of_its_folder(config: Path, tmp_path: Path) -> None:
    command = Command("train", config, folder=tmp_path)
    files = RunFiles(tmp_path / "runs" / "law")
    wait_until(lambda: 1 in steps_in(files), command)
    command.signal(signal.SIGKILL)
    assert command.wait().status == -signal.SIGKILL
    # Forked ranks ask the kernel to die with their parent.
    deadline = time.monotonic() + 5
    while command.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with leased(files, Nodes()) as lease:
        holder = read_lease(files.lease)
        assert holder is not None and (holder.pid, holder.generation) == (os.getpid(), lease.generation) == (
            os.getpid(),
            2,
        )


@pytest.mark.parametrize("blocked", ["runs", "runs/law", "runs/law/checkpoints"])
def test_a_folder_that_cannot_be_written_is_found_before_training(config: Path, tmp_path: Path, blocked: str) -> None:
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file stands here")
    done = run("train", config, folder=tmp_path, status=5)
    assert done.err.startswith("MachineError: runs")
    assert "cannot be written" in done.err


def test_a_step_that_is_not_finite_moves_no_weight(config: Path, tmp_path: Path) -> None:
    # Too large for the squares in a norm, though not for a weight: the run itself finds out in the step after.
    layout = ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")
    settings = ("optimizer.lr=1.0e+30", "checkpoint.every_steps=1", "train.batch_ramp=[]")
    files = RunFiles(tmp_path / "runs" / "law")
    done = run("train", config, *layout, *settings, folder=tmp_path, status=EXIT_BUG)
    found = re.search(r"NonFiniteError: step (\d+) is not learnt from: the loss is nan. Weights were not up", done.err)
    assert found and "Traceback" not in done.err
    step = int(found[1])
    assert f"Samples and documents of the step are in runs/law/bad/{step}.json" in done.err
    assert steps_in(files) == list(range(1, step))
    for name, tensor in tensors(files, step - 1).items():
        assert tensor.isfinite().all(), name
    bad = json.loads(files.bad_step(step).read_text())
    assert bad["step"] == step
    assert [set(rank) for rank in bad["ranks"]] == [{"sample_ids", "document_ids"}] * 2
    assert [len(rank["sample_ids"]) for rank in bad["ranks"]] == [4, 4]
    assert bad["ranks"][0]["sample_ids"] == list(range(4 * (step - 1), 4 * step))


def test_a_complete_run_trains_nothing_and_reports_again(config: Path, copied: RunFiles, tmp_path: Path) -> None:
    shutil.rmtree(copied.checkpoints / "step-00000002")
    copied.report.unlink()
    done = run("train", config, "train.steps=4", "parallel.zero=0", folder=tmp_path)
    assert "law: 4 steps done." in done.out
    assert copied.report.exists()
    assert [path.name for path in copied.checkpoints.glob("step-*")] == ["step-00000004"]
    assert [line["step"] for line in lines(copied) if line["kind"] == "step"] == [1, 2, 3, 4]
    # And it is extended from where it ended, wherever it has been moved to.
    moved = RunFiles(tmp_path / "moved")
    copied.root.rename(moved.root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run("resume", moved.root, "train.steps=5", folder=elsewhere)
    assert f"resuming from {moved.checkpoints / 'step-00000004'} (step 4)" in done.err
    assert [line["step"] for line in lines(moved) if line["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert os.listdir(elsewhere) == [name for name in os.listdir(elsewhere) if name.startswith(("out-", "err-"))]
