"""Laws of the tracker, with the real W&B client: it records, and nothing it does can hold or end a run."""

import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

from megagrok.config.schema import TelemetryConfig
from megagrok.telemetry import tracker as tracker_file
from megagrok.telemetry.records import StepRecord, make_evaluation
from megagrok.telemetry.tracker import NoTracker, Tracker, make_tracker, read_or_make_run_id, wandb_values

MakeStep = Callable[..., StepRecord]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings of the user, and a client that forgets between tests where its server is."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def start(run_dir: Path, mode: Literal["off", "offline", "online"] = "offline") -> Tracker:
    return make_tracker(
        TelemetryConfig(wandb=mode), run_dir=run_dir, run_name="test", resolved_config={"train": {"steps": 3}}
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user would see; the client also keeps a log of its own through `logging`, below warnings."""
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def recorded_runs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def test_an_offline_run_is_recorded_under_the_run_and_a_resumed_one_has_the_same_id(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for start_step in (0, 3):
        began = time.monotonic()
        tracker = start(tmp_path)
        for step in range(start_step + 1, start_step + 4):
            tracker.log(make_step(step, loss=float("nan") if step == 2 else 5.0))
        tracker.log(make_evaluation(step=start_step + 3, loss=4.0, tokens=10))
        # Import and start of the client take a second or two; none of it is here.
        assert time.monotonic() - began < 0.2
        tracker.finish()
        time.sleep(1.1)  # the client names its folders by the second
    runs = recorded_runs(tmp_path)
    assert len(runs) == 2
    assert len({run.name for run in runs}) == 1
    assert runs[0].name == f"run-{read_or_make_run_id(tmp_path)}.wandb"
    assert all(b"experts/imbalance_worst" in run.read_bytes() for run in runs)
    assert warnings(caplog) == []
    assert capfd.readouterr() == ("", "")


def test_off_starts_no_thread_and_writes_nothing(tmp_path: Path, make_step: MakeStep) -> None:
    tracker = start(tmp_path, "off")
    assert isinstance(tracker, NoTracker)
    tracker.log(make_step(1))
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_write_warns_once_and_never_raises(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("a file where the run's folder should be")
    tracker = start(tmp_path / "file")
    for step in range(1, 50):
        tracker.log(make_step(step))
        time.sleep(0.002)
    tracker.finish()
    tracker.log(make_step(50))
    tracker.finish()
    [warning] = warnings(caplog)
    assert warning.startswith("W&B is off for the rest of this run: ")


def test_online_without_a_key_warns_once_and_records_offline(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path, "online")
    tracker.log(make_step(1))
    tracker.finish()
    [warning] = warnings(caplog)
    assert warning.startswith("W&B cannot be reached (no API key; set WANDB_API_KEY")
    assert len(recorded_runs(tmp_path)) == 1


def test_a_server_that_never_answers_holds_neither_a_step_nor_the_end(
    tmp_path: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(tracker_file, "QUEUE_RECORDS", 10)
        tracker = start(tmp_path, "online")
        began = time.monotonic()
        for step in range(1, 1001):
            tracker.log(make_step(step))
        assert time.monotonic() - began < 0.5
        tracker.finish(limit_seconds=0.5)
        assert time.monotonic() - began < 1.5
        dropped, left_behind = warnings(caplog)
        assert "points are dropped" in dropped
        assert "did not finish in 0.5 s and was left behind" in left_behind


@contextmanager
def server(behaviour: str) -> Iterator[int]:
    """A W&B server on this machine that refuses, hangs up, or answers 500 to everything; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    if behaviour == "refuses":
        listening.close()
        yield port
        return

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    if behaviour == "hangs up":
                        # A reset instead of an end: there is no time to linger.
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    else:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    with listening:
        yield port
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("behaviour", ["refuses", "hangs up", "answers 500"])
def test_a_server_in_trouble_holds_neither_a_step_nor_the_end(
    tmp_path: Path,
    make_step: MakeStep,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
) -> None:
    with server(behaviour) as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        tracker = start(tmp_path, "online")
        longest = 0.0
        for step in range(1, 300):
            began = time.monotonic()
            tracker.log(make_step(step))
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.001)
        assert longest < 0.3
        began = time.monotonic()
        tracker.finish(limit_seconds=0.5)
        assert time.monotonic() - began < 1.5
        assert warnings(caplog)  # that it is offline, off, or was left behind


def test_the_run_id_is_made_once(tmp_path: Path) -> None:
    run_id = read_or_make_run_id(tmp_path)
    assert len(run_id) == 8
    assert read_or_make_run_id(tmp_path) == run_id
    assert (tmp_path / "wandb-run-id").read_text() == run_id + "\n"


def test_values_are_flat_and_carry_the_step(make_step: MakeStep) -> None:
    values = wandb_values(make_step(7, mfu=None))
    assert values["step"] == 7
    assert "speed/mfu" not in values
    assert values["experts/imbalance_worst"] == 2.0
    assert values["experts/imbalance_mean"] == 1.5
    assert all(isinstance(value, int | float) for value in values.values())
    assert wandb_values(make_evaluation(step=7, loss=0.0, tokens=1))["evaluation/perplexity"] == 1.0
