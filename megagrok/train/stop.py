"""Being asked to stop: SIGTERM, SIGINT and Slurm's SIGUSR1 set a flag, which the loop reads between two steps.

A handler that saved by itself would start collectives that the other ranks do not expect.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once a signal came to this rank."""

    def __init__(self) -> None:
        self.is_raised = False

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.is_raised = True


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the signals into a flag while the block runs. Call in the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request._raise) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
