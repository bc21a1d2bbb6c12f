"""A file that grows by whole lines, on a disk that may fill up. Not a log and no format: ledger and metrics use it.

The one idea: a line is one write, and what a disk does is said once and costs lines, never the run. Needs no torch.
"""

import os
from collections.abc import Callable
from pathlib import Path

# Enough for the longest line that is looked back at when a file is opened.
TAIL_BYTES = 1 << 20


class LineFile:
    """One process appends. Opened at the first line; no method raises for what a disk does."""

    def __init__(self, path: Path, complain: Callable[[OSError], None]) -> None:
        """complain: told the first thing that goes wrong with the disk, and no more."""
        self._path, self._complain, self._has_complained = path, complain, False
        self._descriptor: int | None = None

    def append(self, line: bytes) -> None:
        """Append a line, with its end, in one write; it is in the kernel's hands when this returns."""
        try:
            self._append(line)
        except OSError as error:
            self._failed(error)

    def sync(self) -> None:
        """Put what was written on the disk."""
        try:
            if self._descriptor is not None:
                os.fsync(self._descriptor)
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Let go of the file; the next line opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = _open_whole(self._path)
        before = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, line) != len(line):
            # A full disk took a part of it: half a line in the middle would cost the line after it too.
            os.ftruncate(self._descriptor, before)
            raise OSError("the disk took only a part of a line")

    def _failed(self, error: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            self._complain(error)


def _open_whole(path: Path) -> int:
    """Open for appending, without the half line that a kill may have left at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    size = os.fstat(descriptor).st_size
    start = max(0, size - TAIL_BYTES)
    tail = os.pread(descriptor, size - start, start)
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(descriptor, start + tail.rfind(b"\n") + 1)
    return descriptor
