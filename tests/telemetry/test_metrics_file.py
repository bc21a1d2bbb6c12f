"""Laws of metrics.jsonl: each step once, whatever happened to the run."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagrok.errors import DataError, MachineError
from megagrok.telemetry.metrics_file import Metrics, open_metrics, read_metrics
from megagrok.telemetry.records import GuardRecord, StepRecord, make_evaluation

MakeStep = Callable[..., StepRecord]


def write_steps(path: Path, make_step: MakeStep, *, after: int, until: int) -> None:
    metrics = open_metrics(path, last_step=after)
    for step in range(after + 1, until + 1):
        metrics.write(make_step(step))
        if step % 2 == 0:
            metrics.write(make_evaluation(step=step, loss=4.0, tokens=10))
    metrics.close()


@pytest.mark.parametrize(
    ("stopped_at", "checkpoint"),
    [(1, 0), (1, 1), (2, 1), (2, 2), (5, 0), (5, 2), (5, 4), (5, 5), (9, 1), (9, 4), (9, 9)],
)
def test_a_run_that_resumes_anywhere_has_each_step_and_evaluation_once(
    tmp_path: Path, make_step: MakeStep, stopped_at: int, checkpoint: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, make_step, after=0, until=stopped_at)
    write_steps(path, make_step, after=checkpoint, until=10)
    metrics = read_metrics(path)
    assert [record.step for record in metrics.steps] == list(range(1, 11))
    assert [record.step for record in metrics.evaluations] == [2, 4, 6, 8, 10]
    write_steps(tmp_path / "whole.jsonl", make_step, after=0, until=10)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path, make_step: MakeStep) -> None:
    metrics = open_metrics(tmp_path / "metrics.jsonl", last_step=0)
    for step in range(1, 4):
        metrics.write(make_step(step))
        assert len(read_metrics(tmp_path / "metrics.jsonl").steps) == step
    metrics.close()


def test_every_line_is_strict_json_also_after_a_divergence(tmp_path: Path, make_step: MakeStep) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path, last_step=0)
    metrics.write(make_step(1, loss=float("nan")))
    metrics.write(make_evaluation(step=1, loss=float("inf"), tokens=1))
    metrics.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [lines[0]["loss"], lines[1]["loss"]] == ["nan", "inf"]
    assert read_metrics(path).evaluations[0].loss == float("inf")


@pytest.mark.parametrize("torn", [b'{"kind":"step","st', b"\xff\x00\x00", b"\x00" * 4096])
def test_a_last_line_torn_by_a_kill_is_left_out_and_gone_after_the_next_start(
    tmp_path: Path, make_step: MakeStep, torn: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, make_step, after=0, until=3)
    with path.open("ab") as stream:
        stream.write(torn)
    assert [record.step for record in read_metrics(path).steps] == [1, 2, 3]
    write_steps(path, make_step, after=3, until=4)
    assert [record.step for record in read_metrics(path).steps] == [1, 2, 3, 4]


def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, make_step: MakeStep) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, make_step, after=0, until=1)
    with path.open("a") as stream:
        stream.write("half a line\n[1]\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON.*Move the file away"):
        read_metrics(path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        open_metrics(path, last_step=1)


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path: Path, make_step: MakeStep) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("anything, also damaged\nbytes\n")
    write_steps(path, make_step, after=0, until=1)
    assert [record.step for record in read_metrics(path).steps] == [1]


def test_an_evaluation_is_written_once_and_a_step_never_goes_back(tmp_path: Path, make_step: MakeStep) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, make_step, after=0, until=4)
    metrics = open_metrics(path, last_step=4)
    metrics.write(make_evaluation(step=4, loss=4.0, tokens=10))
    with pytest.raises(AssertionError, match="step 4 after 4"):
        metrics.write(make_step(4))
    metrics.close()
    assert [record.step for record in read_metrics(path).evaluations] == [2, 4]


def test_what_the_machine_refuses_is_said_with_the_path(tmp_path: Path, make_step: MakeStep) -> None:
    with pytest.raises(MachineError, match=r"no_such_folder.metrics\.jsonl cannot be opened"):
        open_metrics(tmp_path / "no_such_folder" / "metrics.jsonl", last_step=0)
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_disk_that_fills_up_costs_lines_and_is_said_once(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path, last_step=0)
    metrics.write(make_step(1))
    with full_disk(path.stat().st_size + 20):  # the next line fits in part
        metrics.write(make_step(2))
        metrics.write(make_step(3))
        metrics.write(make_evaluation(step=3, loss=1.0, tokens=1))
    metrics.write(make_step(4))
    metrics.close()
    assert [record.step for record in read_metrics(path).steps] == [1, 4]
    (said,) = caplog.messages
    assert "metrics.jsonl cannot be written" in said and "training goes on" in said


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the kernel refuses, as it does where space is out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_way_back_drops_the_steps_that_come_again_and_keeps_what_the_guard_said(
    tmp_path: Path, make_step: MakeStep
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path, last_step=0)
    refused = GuardRecord(
        step=4, generation=1, decision="rewind", reason="so", loss=float("nan"), grad_norm=2.0, next_step=3
    )
    for step in range(1, 4):
        metrics.write(make_step(step))
        metrics.write(make_evaluation(step=step, loss=4.0, tokens=10))
    metrics.write(refused)
    metrics.go_back(2)
    for step in (3, 4):
        metrics.write(make_step(step))
        metrics.write(make_evaluation(step=step, loss=5.0, tokens=10))
    metrics.close()
    for reread in (read_metrics(path), reopened(path)):
        assert [record.step for record in reread.steps] == [1, 2, 3, 4]
        assert [(record.step, record.loss) for record in reread.evaluations] == [(1, 4.0), (2, 4.0), (3, 5.0), (4, 5.0)]
        (kept,) = reread.guards
        assert (kept.step, kept.decision, kept.grad_norm, kept.next_step) == (4, "rewind", 2.0, 3)


def reopened(path: Path) -> Metrics:
    open_metrics(path, last_step=4).close()
    return read_metrics(path)


WRITER = """
import sys
from pathlib import Path
from megagrok.telemetry.metrics_file import open_metrics
from megagrok.telemetry.records import make_evaluation
metrics = open_metrics(Path(sys.argv[1]), last_step=0)
for step in range(1, 10**9):
    metrics.write(make_evaluation(step=step, loss=1.0, tokens=1))
"""


def test_a_killed_writer_leaves_every_line_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env={"PYTHONPATH": ":".join(sys.path)})
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 10_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    steps = [record.step for record in read_metrics(path).evaluations]
    assert len(steps) > 100
    assert steps == list(range(1, len(steps) + 1))
