"""The `megagrok` command in a process of its own, and what it leaves behind, compared bit by bit.

The process is forked from the test, which has imported Megatron and DeepSpeed once: a second instead of ten, and the
ranks below it are as real as ever. It leads a session, so that nothing it starts can hide.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Once, here, for all processes that are forked below.
import megagrok.telemetry.figures
import megagrok.train.worker  # noqa: F401
from megagrok.checkpoint import find_checkpoint
from megagrok.cli import main
from megagrok.parallel.ranks import Alone
from megagrok.train.files import RunFiles

LIMIT_SECONDS = 120.0
CLOCKS = ("step_seconds", "tokens_per_second", "mfu")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended: the exit status (negative: the signal that killed it) and what it said."""

    status: int
    out: str
    err: str


class Command:
    """A command that runs. `wait` must be called."""

    def __init__(self, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        """folder: where it is called; paths in arguments and settings are relative to it.
        environment: variables that it sees besides this process's own."""
        self._environment = environment or {}
        self._texts = [folder / f"{stream}-{time.monotonic_ns()}.txt" for stream in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live([str(argument) for argument in arguments], folder)

    def _live(self, arguments: list[str], folder: Path) -> None:
        status = 99
        try:
            os.setsid()
            os.chdir(folder)
            os.environ.update(self._environment)
            for number, path in enumerate(self._texts, start=1):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = self.main(arguments)
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def main(self, arguments: list[str]) -> int:
        """What the process does."""
        return main(arguments)

    def signal(self, number: int) -> None:
        """Send a signal to the command, not to its ranks."""
        os.kill(self.pid, number)

    def ranks(self) -> list[int]:
        """Process ids of its children, which are its ranks, in rank order, once the data is prepared."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sorted(int(child) for child in children)

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> Done:
        """Wait for its end. Kills it, and fails, after the limit."""
        deadline = time.monotonic() + limit_seconds
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {limit_seconds:g} s:\n{self._texts[1].read_text()}")
            time.sleep(0.02)
        out, err = (path.read_text(encoding="utf-8") for path in self._texts)
        return Done(os.waitstatus_to_exitcode(ended[1]), out, err)

    def survivors(self) -> list[int]:
        """Processes that it started, at any remove, and that stay alive: a library's import may call a tool, which a
        stop in that moment leaves to end by itself."""
        patience = time.monotonic() + 2
        while (found := self.alive()) and time.monotonic() < patience:
            time.sleep(0.05)
        return found

    def alive(self) -> list[int]:
        """Processes that it started, at any remove, and that are alive now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(session) == self.pid and state != "Z":
                    found.append(int(entry.name))
        return found


def run(*arguments: object, folder: Path, status: int = 0) -> Done:
    """A command from its begin to its end, which has to be `status`."""
    done = Command(*arguments, folder=folder).wait()
    assert done.status == status, f"exit status {done.status}, {status} was expected\n{done.out}\n{done.err}"
    return done


def wait_until(condition: Callable[[], bool], command: Command, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Poll as fast as it goes, while the command runs."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline and command.ranks() is not None, "it did not come to that"
        time.sleep(0.001)


def steps_in(files: RunFiles) -> list[int]:
    """Steps that metrics.jsonl has now."""
    return [line["step"] for line in lines(files) if line["kind"] == "step"] if files.metrics.exists() else []


def lines(files: RunFiles) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says. Floats come back from JSON with all their bits."""
    whole = files.metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in whole]


def losses(files: RunFiles) -> dict[tuple[str, int], float]:
    """Loss by kind of record and step."""
    return {(line["kind"], line["step"]): line["loss"] for line in lines(files)}


def tensors(files: RunFiles, step: int) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint of a step: weights, moments, router loads."""
    checkpoint = find_checkpoint(files.checkpoints, ranks=Alone(), step=step)
    assert checkpoint is not None
    shapes = {name: checkpoint.shape_of(name) for name in checkpoint.names()}
    return {name: checkpoint.read(name, (0,) * len(shape), shape) for name, shape in shapes.items()}


def assert_same_run(files: RunFiles, untouched: RunFiles, step: int) -> None:
    """Every line of the metrics and every bit of the last checkpoint."""
    assert lines(files) == lines(untouched)
    assert_same_bits(tensors(files, step), tensors(untouched, step))


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), f"{name} differs"


def damage(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def copy_until(untouched: RunFiles, step: int, folder: Path) -> RunFiles:
    """A run's folder as it was when `step` had been saved and nothing after it."""
    files = RunFiles(folder / untouched.root.name)
    shutil.copytree(untouched.root, files.root)
    for path in files.checkpoints.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return files
