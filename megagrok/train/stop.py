"""Being asked to stop: SIGTERM, SIGINT and Slurm's SIGUSR1 set a flag, which the loop reads between two steps.

A handler that saved by itself would start collectives that the other ranks do not expect. Before there are ranks
nothing is to be saved, and the same signals end the process with the same status.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megagrok.errors import EXIT_PREEMPTED
from megagrok.parallel.forked import STOP_SIGNALS


class Preempted(SystemExit):
    """The run was asked to stop, and has saved what there was; exit status 76 tells a scheduler to start it again."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class StopRequest:
    """True once a signal came to this rank."""

    def __init__(self) -> None:
        self.is_raised = False

    def check(self) -> None:
        """Raise Preempted if a signal came."""
        if self.is_raised:
            raise Preempted()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.is_raised = True


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the signals into a flag while the block runs. Call in the main thread of a rank."""
    request = StopRequest()
    with _handled_by(request._raise):
        yield request


@contextmanager
def leave_on_stop() -> Iterator[StopRequest]:
    """Turn the signals into Preempted while the block runs. Call in the main thread, around what has no ranks yet.

    Python drops an exception that a handler raises inside some callbacks (those of a fork, say): the block checks the
    request again before it starts something that others wait for.
    """
    request = StopRequest()

    def leave(number: int, frame: FrameType | None) -> None:
        request._raise(number, frame)
        request.check()

    with _handled_by(leave):
        yield request


@contextmanager
def hold_signals() -> Iterator[None]:
    """Keep the signals waiting while the block runs, and for ever in a process that it forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
