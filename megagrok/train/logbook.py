"""A launcher's own page of a start (attempt.py), kept while its ranks run: from heartbeats to node-K.json.

One per launcher. Trouble in writing it never ends a run.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megagrok.errors import EXIT_BUG, MachineError, MegagrokError, RankError
from megagrok.parallel.beats import Beat, Beats
from megagrok.parallel.placement import Nodes
from megagrok.train.attempt import Ending, NodePage, RankState, attempt_folder, write_page
from megagrok.whole_file import write_whole

_WRITE_SECONDS = 2.0


class Logbook:
    """The page of launcher `nodes.index` for start `generation` of the run in the folder `root`."""

    def __init__(self, root: Path, generation: int, nodes: Nodes) -> None:
        self._root, self._generation, self._nodes = root, generation, nodes
        self._started_at, self._host = time.time(), socket.gethostname()
        self._pids: Sequence[int] = ()
        self._beats: list[Beat] = []
        self._written_at = 0.0

    def log_of(self, rank: int) -> Path:
        """The file of a rank's output in this start, with its first line in place. Raises MachineError."""
        path = attempt_folder(self._root, self._generation) / f"rank-{rank:05d}.log"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._started_at))
        header = f"# rank {rank} on {self._host}, start {self._generation}, job {self._nodes.job}, {at}\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not through a link, whoever put it there.
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "wb") as log:
                log.write(header.encode())
        except OSError as error:
            raise MachineError(f"{path} cannot be written: {error.strerror}. Free it, or repair the disk.") from error
        return path

    def started(self, pids: Sequence[int]) -> None:
        """Take the ranks' process ids, in rank order."""
        self._pids = pids

    def look(self, beats: list[Beat]) -> None:
        """Take the ranks' beats, and write the page now and then."""
        self._beats = beats
        if time.monotonic() - self._written_at >= _WRITE_SECONDS:
            self._written_at = time.monotonic()
            self._write(None)

    def close(self, beats: list[Beat], error: BaseException | None) -> None:
        """Write how it ended. A hang's stacks get a file of their own."""
        self._beats = beats
        ending = self._ending(error)
        self._write(ending)
        if isinstance(error, RankError) and error.stacks:
            try:
                folder = attempt_folder(self._root, self._generation)
                write_whole(folder / f"stacks-node-{self._nodes.index:03d}.txt", error.stacks)
            except OSError:
                return  # they are in the launcher's output too

    def _ending(self, error: BaseException | None) -> Ending:
        rank = error.rank if isinstance(error, MegagrokError) else None
        blamed = next((beat for beat in self._beats if beat.rank == rank), None)
        furthest = max(self._beats, key=lambda beat: beat.step, default=None)
        seen = blamed or furthest
        return Ending(
            exit_code=exit_code_of(error),
            at=time.time(),
            host=self._host,
            rank=rank,
            phase=None if seen is None else seen.phase,
            step=None if seen is None else seen.step,
            error=None if error is None or isinstance(error, SystemExit) else type(error).__name__,
            message=str(error).split("\n")[0] if isinstance(error, Exception) else "",
            saved_step=max((beat.saved for beat in self._beats if beat.saved is not None), default=None),
            is_node_suspect=isinstance(error, RankError) and error.is_node_suspect,
        )

    def _write(self, ending: Ending | None) -> None:
        now = time.monotonic()
        ranks = [
            RankState(
                rank=beat.rank,
                pid=pid,
                phase=beat.phase,
                step=beat.step,
                beats=beat.beats,
                age_seconds=round(now - beat.at, 3),
            )
            for beat, pid in zip(self._beats, self._pids, strict=False)
        ]
        page = NodePage(
            generation=self._generation,
            node=self._nodes.index,
            num_nodes=self._nodes.count,
            host=self._host,
            job=self._nodes.job,
            restart=self._nodes.restart,
            pid=os.getpid(),
            started_at=self._started_at,
            at=time.time(),
            ranks=tuple(ranks),
            ending=ending,
            slowest_save_seconds=max((beat.slowest_save_seconds for beat in self._beats), default=0.0) or None,
        )
        try:
            write_page(self._root, page)
        except OSError:
            return  # a full disk costs the operator this page, not the run


@contextmanager
def on_record(logbook: Logbook, beats: Beats) -> Iterator[None]:
    """Close the page with however the block ends."""
    try:
        yield
    except BaseException as error:
        logbook.close(beats.read(), error)
        raise
    logbook.close(beats.read(), None)


def exit_code_of(error: BaseException | None) -> int:
    """The exit status that a launcher ends with."""
    match error:
        case None:
            return 0
        case MegagrokError():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case _:
            return EXIT_BUG
