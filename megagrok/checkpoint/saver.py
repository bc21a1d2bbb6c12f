"""Saves that do not hold the run: a step waits for a copy in host memory, a thread does the rest.

The thread tells the story of save.py, on every rank over a process group that nobody else uses. There is never more
than one write under way: who saves again waits for the one before, so memory and disk traffic are bounded however slow
the disk is. The one idea: a save that fails is an answer, not an exception. It is the same on all ranks, and whoever
trains decides what it means; what is not an answer (a lost peer, a bug) is raised where the run can see it.
"""

import copy
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fence import Fence, Unfenced
from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.save import NotPruned, Save, Saved, save_through
from megagrok.checkpoint.staging import StagingBuffer
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one save ended; the same on all ranks but for the clocks."""

    step: int
    is_in_place: bool
    """Whether there is a checkpoint of the step now."""
    error: CheckpointError | None
    """Why there is none; or, if there is one, why older ones could not be pruned."""
    bytes: int
    """Of all tensors over all ranks; 0 for a save that failed."""
    held_seconds: float
    """What the step waited for the copy."""
    write_seconds: float
    """From there until the checkpoint was in place, or was not."""
    waited_seconds: float
    """What the run waited for the write in `finish`."""

    @property
    def gigabytes_per_second(self) -> float:
        """Of all ranks together, digests and syncs included."""
        return self.bytes / 1e9 / max(self.write_seconds, 1e-9)


class AsyncSaver:
    """The saves of one run, on one rank. `save` and `finish` are called by all ranks in the same order."""

    def __init__(
        self, root: Path, *, ranks: Ranks, keep: int, fence: Fence | None = None, disk: Disk | None = None
    ) -> None:
        """root, keep, fence: as for `save_checkpoint`.

        ranks: over a process group of its own, which works on the host (gloo) and is used by the writer thread alone:
        collectives of two threads in one group would meet the wrong ones.
        """
        self._root, self._ranks, self._keep = root, ranks, keep
        self._fence = fence or Unfenced()
        self._disk = disk or Disk()
        self._staging = StagingBuffer()
        self._write: _Write | None = None

    @property
    def is_writing(self) -> bool:
        """True from `save` until `finish`; the same on all ranks."""
        return self._write is not None

    @property
    def has_outcome(self) -> bool:
        """Whether `finish` would return at once, as far as this rank knows. Local."""
        return self._write is not None and not self._write.thread.is_alive()

    def save(self, step: int, fragments: Iterable[Fragment], facts: Mapping[str, JSON]) -> Outcome | None:
        """Begin to save; returns once nothing of the caller's is needed any more. Not a collective by itself.

        Step and facts are taken by value. Waits for the save before, if nobody has, and returns its outcome.
        """
        previous = self.finish()
        started = time.perf_counter()
        save = Save(self._disk, self._root, step, copy.deepcopy(dict(facts)), self._ranks, self._keep, self._fence)
        staged = self._staging.stage(fragments)
        self._write = _Write(save, staged, time.perf_counter() - started)
        self._write.thread.start()
        return previous

    def finish(self) -> Outcome | None:
        """Wait for the write that is under way and say how it ended; None if there is none.

        Raises what is no answer of a save: the error of a collective whose peer is gone, or of a bug.
        """
        if self._write is None:
            return None
        write, started = self._write, time.perf_counter()
        write.thread.join()
        self._write = None
        return write.outcome(time.perf_counter() - started)

    def abandon(self, limit_seconds: float) -> None:
        """Give the write that is under way, if any, so much time to end; for a run that ends by an error."""
        if self._write is not None:
            self._write.thread.join(limit_seconds)


class _Write:
    """One write and its thread. The thread sets the fields below and ends; only then are they read."""

    def __init__(self, save: Save, staged: list[Fragment], held_seconds: float) -> None:
        self._save, self._staged, self._held_seconds = save, staged, held_seconds
        self._saved: Saved | None = None
        self._failure: BaseException | None = None
        self._seconds = 0.0
        # A daemon: after the grace of `abandon`, a write to a dead disk must not keep a failed rank alive.
        self.thread = threading.Thread(target=self._run, name=f"save step {save.step}", daemon=True)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._saved = save_through(self._save, self._staged, are_private=True)
        except BaseException as failure:  # not to go on: `outcome` raises it, in the thread that can end the run
            self._failure = failure
        self._seconds = time.perf_counter() - started

    def outcome(self, waited_seconds: float) -> Outcome:
        if self._failure is not None and not isinstance(self._failure, CheckpointError):
            raise self._failure
        return Outcome(
            step=self._save.step,
            is_in_place=self._saved is not None or isinstance(self._failure, NotPruned),
            error=self._failure,
            bytes=0 if self._saved is None else self._saved.bytes,
            held_seconds=self._held_seconds,
            write_seconds=self._seconds,
            waited_seconds=waited_seconds,
        )
