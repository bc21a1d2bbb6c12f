"""One forked process that reports how it ended: both sides of the pipe. Knows no process groups; launch.py does.

The one idea: a rank reports (value, exit, error, with the time), then waits with its connections open until it is
released. No rank fails because a peer finished first, and of several failures the earliest is the cause, not the echo.
"""

import ctypes
import faulthandler
import gc
import multiprocessing
import multiprocessing.reduction
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from megagrok import errors
from megagrok.errors import MegagrokError

# Slurm's own warning before a time limit is whatever --signal says; SIGUSR1 is the custom.
STACK_SIGNAL = signal.SIGUSR2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAVE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Returned:
    """The function came back."""

    value: object


@dataclass(frozen=True, slots=True)
class Exited:
    """Left by SystemExit: a chosen ending, such as 76 after a save, that peers may still be working towards."""

    code: int


@dataclass(frozen=True, slots=True)
class Raised:
    """Left by an exception. `error` is its class, or for ours the nearest one that megagrok/errors.py has."""

    at: float
    error: str
    message: str
    trace: str


@dataclass(frozen=True, slots=True)
class Died:
    """Ended without a report. `at` is when it was last seen alive: before its death, and so before any echo of it."""

    at: float
    how: str


Failure = Raised | Died
Ending = Returned | Exited | Failure


class ForkedRank:
    """A forked rank, seen from the parent. Forked on construction; `reap` must be called."""

    def __init__(
        self, name: str, body: Callable[[], object], *, log: Path | None = None, stack_file: Path | None = None
    ) -> None:
        """log: where its output goes, appended; None leaves it with the parent's.
        stack_file: where it writes its Python stacks whenever STACK_SIGNAL comes."""
        context = multiprocessing.get_context("fork")
        self.pipe, rank_end = context.Pipe()
        self._process = context.Process(target=_live, args=(body, rank_end, os.getpid(), log, stack_file), name=name)
        self._seen_alive = time.time()
        self.ending: Ending | None = None
        self._is_reaped = False
        self._process.start()
        # Only the rank may hold its end: then its death is an end of file here.
        rank_end.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return cast(int, self._process.pid)

    def look(self, quiet_since: float | None) -> None:
        """Take the rank's report if there is one, or note its death.

        quiet_since: nobody has reported since then; None if somebody just did. Linux closes the sockets of a process
        that is killed before it looks dead from here: when the first report is a peer's complaint about that, a
        sighting now would date the death after its own echo.
        """
        # In this order: a report sent just before death still lies in the pipe.
        alive = self._process.is_alive()
        if self.pipe.poll():
            try:
                self.ending = cast(Ending, self.pipe.recv())
            except (EOFError, ConnectionResetError):
                self._process.join(timeout=1)
                self.ending = Died(self._seen_alive, self._how_it_died())
        elif alive:
            self._seen_alive = self._seen_alive if quiet_since is None else quiet_since
        else:
            self.ending = Died(self._seen_alive, self._how_it_died())

    def release(self) -> None:
        """Let a rank that has reported leave and close its connections."""
        try:
            self.pipe.send_bytes(b"leave")
        except OSError:
            return  # it is gone already

    def signal(self, number: int) -> None:
        """Send a signal, unless the rank has been reaped (its process id may be another's by now)."""
        if not self._is_reaped and self._process.is_alive():
            os.kill(self.pid, number)

    def reap(self) -> None:
        """Leave nothing behind: no process, no zombie, no descriptor."""
        if self.ending is not None:
            self.release()
            self._process.join(timeout=LEAVE_SECONDS)
        # A stop signal may still come, and be passed on, while the others are reaped.
        self._is_reaped = True
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()

    def _how_it_died(self) -> str:
        status = self._process.exitcode
        if status is None:
            return "closed its pipe without a report"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status} and without a report"


def _live(
    body: Callable[[], object],
    pipe: "Connection[Ending, bytes]",
    parent: int,
    log: Path | None,
    stack_file: Path | None,
) -> None:
    """The rank's whole life. The parent holds stop signals back across the fork; they are let in here."""
    _die_with(parent)
    if stack_file is not None:
        # Written by faulthandler's own handler, in C: it answers while the rank hangs in C code or holds every lock.
        faulthandler.register(STACK_SIGNAL, file=stack_file.open("ab", buffering=0), all_threads=True)
    if log is not None:
        _write_output_to(log)
    # Everything from before the fork is the parent's to collect: looking through it here would only copy its pages, and
    # takes half a second each of the eight times that DeepSpeed collects while it builds a bf16 optimizer.
    gc.freeze()
    # A process group of its own: Ctrl-C on a terminal then reaches the parent alone, which passes it on once.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # torch would send a tensor as a descriptor of shared memory, which is gone when the rank has left: send the values.
    # This is the child, so only what this rank sends is changed.
    multiprocessing.reduction.ForkingPickler.register(torch.Tensor, _tensor_by_value)
    multiprocessing.reduction.ForkingPickler.register(torch.nn.Parameter, _tensor_by_value)
    try:
        _report(pipe, body)
        pipe.recv_bytes()
    except (EOFError, OSError):
        return  # the parent is gone, and so is everyone who could want to know


def _report(pipe: "Connection[Ending, bytes]", body: Callable[[], object]) -> None:
    try:
        try:
            ending: Ending = Returned(body())
        except SystemExit as exit_:
            ending = Exited(exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None))
        pipe.send(ending)
    except BaseException as error:
        ours = [kind.__name__ for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind]
        is_ours = isinstance(error, MegagrokError)
        name = ours[0] if is_ours else type(error).__name__
        pipe.send(Raised(time.time(), name, str(error), traceback.format_exc()))


def _write_output_to(log: Path) -> None:
    """Send what this process, its libraries and their C code print to a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked


def _tensor_by_value(
    tensor: torch.Tensor,
) -> tuple[Callable[[bytes, torch.dtype, tuple[int, ...]], torch.Tensor], tuple[Any, ...]]:
    flat = tensor.detach().cpu().contiguous().flatten()
    return _tensor_from_bytes, (flat.view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape))


def _tensor_from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
