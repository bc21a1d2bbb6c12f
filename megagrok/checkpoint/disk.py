"""Every change that a save makes to the file system, and the one way a load opens a file. Decides nothing.

The writer goes through `Disk` alone, so a test can stop the world between any two steps of a save.
"""

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagrok.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Space:
    """What a file system has left for this user."""

    bytes: int
    files: int
    """Names that can still be made; -1 where the file system sets no limit."""

    def lack(self, place: Path, needed_bytes: int, needed_files: int) -> str | None:
        """Why so much does not fit at `place`, or None."""
        if needed_bytes > self.bytes:
            return f"No space left on {place}: needs {_size(needed_bytes)}, has {_size(self.bytes)}"
        if 0 <= self.files < needed_files:
            return f"No space left on {place}: needs {needed_files} files (inodes), has {self.files}"
        return None


def _size(count: int) -> str:
    unit, name = (1e9, "GB") if count >= 1e10 else (1e6, "MB")
    return f"{count / unit:,.1f} {name}"


class Disk:
    """The steps of a save. All raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents; it may exist."""
        path.mkdir(parents=True, exist_ok=True)

    def free_space(self, path: Path) -> Space:
        """What is left where the directory `path` lies."""
        status = os.statvfs(path)
        return Space(status.f_bavail * status.f_frsize, status.f_favail if status.f_files else -1)

    def create(self, path: Path) -> int:
        """Create a file that does not exist, not through a link, and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        """Write all bytes; the kernel may take them in parts."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close; network file systems report late write errors here."""
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory are on the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move in one step; a file at the target is replaced, a directory there must be empty."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file; it may be gone already."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and what is in it; of a link the link alone, never what it leads to."""
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)

    def write_file(
        self, path: Path, data: bytes, *, beside: Path | None = None, check: Callable[[], None] | None = None
    ) -> None:
        """Put a small file in place in one step: beside it, synced, renamed over; `check` may refuse right before."""
        beside = beside or path.with_name(path.name + ".tmp")
        self.remove(beside)
        descriptor = self.create(beside)
        try:
            self.write(descriptor, data)
            self.sync(descriptor)
        finally:
            os.close(descriptor)
        if check is not None:
            check()
        self.rename(beside, path)
        self.sync_directory(path.parent)


def open_file(path: Path) -> tuple[int, int]:
    """Open a regular file for reading, not through a link; returns (descriptor, bytes). Raises CheckpointError.

    Without O_NONBLOCK a named pipe in the place of a file would hang every rank.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return descriptor, status.st_size


def read_range(path: Path, descriptor: int, offset: int, size: int) -> bytearray:
    """Read exactly `size` bytes at `offset`. The caller has checked both against the file's size."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error
        if not count:
            raise CheckpointError(f"{path}: ends at byte {offset}; it became shorter while it was read")
        view, offset = view[count:], offset + count
    return data
