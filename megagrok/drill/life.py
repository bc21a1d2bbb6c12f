"""One start of the drilled run in a process of its own, and a hand on that process and its ranks.

The process is forked from the drill, which has imported everything once: what is drilled is the run, not the import. It
leads a session, so that nothing it starts can hide.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megagrok.config import RunConfig
from megagrok.errors import MegagrokError
from megagrok.train.beginning import Inject, Request
from megagrok.train.files import RunFiles
from megagrok.train.launcher import import_trainer
from megagrok.train.logbook import exit_code_of
from megagrok.train.start import start_training

LIMIT_SECONDS = 300.0
_POLL_SECONDS = 0.002


class Life:
    """A start of `run`. `end` or `wait` must be called."""

    def __init__(self, run: RunConfig, *, output: Path, inject: "Inject | None" = None) -> None:
        """output: the file to which it says what a command would say on the terminal, appended.
        inject: see megagrok.train.beginning.Request."""
        import_trainer()
        self.run, self.files = run, RunFiles.of(run)
        self.output = output
        self._said_before = output.stat().st_size if output.exists() else 0
        self.started_at = time.time()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _live(run, self.files, output, Request(inject=inject, looks_back=False))
        self.status: int | None = None

    @property
    def said(self) -> str:
        """What it has said so far."""
        if not self.output.exists():
            return ""
        with self.output.open("rb") as stream:
            stream.seek(self._said_before)
            return stream.read().decode("utf-8", "replace")

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def children(self) -> list[int]:
        """Process ids of whatever it has started and that lives: ranks, or the child that prepares the data."""
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return sorted(map(int, text.split()))

    def until(self, condition: Callable[[], bool], limit_seconds: float = LIMIT_SECONDS) -> bool:
        """Wait for a condition; False if the life ended first. Raises TimeoutError after the limit."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if not self.is_running():
                return False
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError(f"nothing came of it in {limit_seconds:g} s; it said:\n{self.said}")
            time.sleep(_POLL_SECONDS)
        return True

    def ends_before(self, condition: Callable[[], bool], limit_seconds: float) -> bool:
        """Whether it ends by itself before something comes true, and before the limit."""
        deadline = time.monotonic() + limit_seconds
        while self.is_running() and time.monotonic() < deadline and not condition():
            time.sleep(_POLL_SECONDS)
        return not self.is_running()

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """Wait for its end; returns the exit status, negative for the signal that killed it."""
        self.until(lambda: False, limit_seconds)
        assert self.status is not None
        return self.status

    def end(self) -> None:
        """Kill all of it, as a power cut would."""
        for pid in self.survivors():
            _kill(pid, signal.SIGKILL)
        while self.is_running():
            time.sleep(_POLL_SECONDS)

    def survivors(self) -> list[int]:
        """Processes of its session that are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[3]) == self.pid and fields[0] not in ("Z", "X"):
                    found.append(int(entry.name))
        return found


def _live(run: RunConfig, files: RunFiles, output: Path, request: Request) -> None:
    """The life itself; never returns."""
    status = 99
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        start_training(run, files, request)
        status = 0
    except BaseException as error:
        status = exit_code_of(error)
        if isinstance(error, MegagrokError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
