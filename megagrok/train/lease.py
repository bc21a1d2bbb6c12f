"""Who holds a run: one start at a time writes in its folder, and a start that was overtaken can no longer harm it.

Every start takes the next *generation*. A writer that was thought dead (its node was cut off, say) finds a later one on
the lease when it wants to commit, and stops; what it stages carries its own generation and is in nobody's way. The
lease itself is changed under a file lock, held for a moment only: a lock held for the life of a run would outlive
a node on some file systems, and be nothing on others.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from megagrok.errors import CheckpointError, MachineError
from megagrok.parallel.placement import Nodes
from megagrok.parallel.ranks import Ranks
from megagrok.train.attempt import generations
from megagrok.train.files import RunFiles
from megagrok.whole_file import write_whole

REFRESH_SECONDS = 2.0
# A holder that has not been heard for so long is gone; it will find out by its generation if it is not.
STALE_SECONDS = 30.0
# A process of this machine that has just been killed is gone after a moment.
_PATIENCE_SECONDS = 0.5
_POLL_SECONDS = 0.05
_AGAIN_SECONDS = 0.2
_LOCK_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What lease.json says."""

    generation: int
    host: str
    pid: int
    pid_started: int
    """When the process started, in clock ticks since boot: with the pid it names one process."""
    machine: str
    """Boot and pid namespace: where the pid means something."""
    job: str | None
    restart: int
    beat_at: float
    """Seconds since 1970 when the holder last said that it lives."""
    released: bool

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self)) + "\n"


class Lease:
    """This start's hold on the run. Its ranks inherit it and only `check`; the launcher that took it refreshes it."""

    def __init__(self, path: Path, mine: Holder, *, is_taker: bool) -> None:
        self._path, self._mine, self._is_taker = path, mine, is_taker
        self._refreshed_at = 0.0

    @classmethod
    def shared(cls, path: Path, processes: Ranks, taken: list["Lease"]) -> "Lease":
        """The lease that process 0 has taken, for all `processes` of the start to check. Collective."""
        mine = processes.gather(asdict(taken[0]._mine) if taken else None)[0]
        assert isinstance(mine, dict)
        return taken[0] if taken else cls(path, Holder(**cast(dict[str, Any], mine)), is_taker=False)

    @property
    def generation(self) -> int:
        """How often the run has been started, this time included."""
        return self._mine.generation

    def check(self) -> None:
        """Raise CheckpointError if a later start holds the run, or nobody can tell."""
        holder = read_lease(self._path)
        if holder is None:
            # A network file system may fail to show a file that is being replaced.
            time.sleep(_AGAIN_SECONDS)
            holder = read_lease(self._path)
        if holder is None or holder.generation != self.generation:
            raise self._overtaken(holder)

    def refresh(self) -> None:
        """Say that this start lives, if this process took the lease; at most every REFRESH_SECONDS.

        Raises CheckpointError once a later start holds the run. That nobody can tell for a while ends no run.
        """
        if time.monotonic() - self._refreshed_at < REFRESH_SECONDS:
            return
        self._refreshed_at = time.monotonic()
        if not self._is_taker:
            holder = read_lease(self._path)
        else:
            try:
                holder = self._write_if_held()
            except (MachineError, OSError):
                return  # a full disk makes the lease look old
        if holder is not None and holder.generation > self.generation:
            raise self._overtaken(holder)

    def release(self) -> None:
        """Let the next start have it at once."""
        try:
            self._write_if_held(released=True)
        except (MachineError, OSError):
            return  # it will look stale

    def _write_if_held(self, *, released: bool = False) -> Holder | None:
        """Write the lease unless somebody else has it; returns what it said before."""
        with _locked(self._path.with_suffix(".lock")):
            holder = read_lease(self._path)
            if holder is not None and holder.generation == self.generation:
                _write(self._path, self._mine, released=released)
            return holder

    def _overtaken(self, holder: Holder | None) -> CheckpointError:
        later = "nobody" if holder is None else f"start {holder.generation} ({_name(holder)})"
        return CheckpointError(
            f"{self._path.parent} is now held by {later}; this is start {self.generation}, which was thought dead. "
            "It writes nothing more."
        )


@contextmanager
def leased(files: RunFiles, nodes: Nodes, *, beating: bool = False) -> Iterator[Lease]:
    """Hold the run's folder while the block runs. One process of a run calls it.

    beating: refresh it in a thread, where no launcher does so between looks at its ranks.
    Raises CheckpointError that names who holds it, and MachineError if the folder cannot be written: both before a
    step is made that could not be saved.
    """
    try:
        files.checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=files.checkpoints).close()
        lease = _take(files, nodes)
    except OSError as error:
        raise MachineError(
            f"{error.filename or files.checkpoints} cannot be written: {error.strerror}. "
            "Free it, or set runs_dir to a folder that can."
        ) from error
    ended = threading.Event()
    if beating:
        threading.Thread(target=_beat, args=(lease, ended), name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        ended.set()
        lease.release()


def next_generation(files: RunFiles) -> int:
    """The generation that the next start will have."""
    holder = read_lease(files.lease)
    return 1 + max([0 if holder is None else holder.generation, *generations(files.root)])


def read_lease(path: Path) -> Holder | None:
    """What the lease says; None if there is none that can be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def require_idle(path: Path) -> None:
    """Raise CheckpointError if the lease at `path` says that a run lives; for tools that change its folder."""
    holder = read_lease(path)
    if holder is not None and _may_live(holder, Nodes()):
        raise CheckpointError(f"{path.parent} is in use by {_name(holder)}. Stop it first.")


def _take(files: RunFiles, nodes: Nodes) -> Lease:
    """Wait until nobody holds the run, for as long as it takes to know, and take it."""
    first: Holder | None = None
    seen_at = time.monotonic()
    while True:
        with _locked(files.lock):
            holder = read_lease(files.lease)
            if holder is None or not _may_live(holder, nodes):
                return _next(files, nodes)
        first = holder if first is None else first
        watched = time.monotonic() - seen_at
        is_heard = holder.beat_at != first.beat_at or holder.generation != first.generation
        if is_heard or (holder.machine == _machine() and watched > _PATIENCE_SECONDS):
            raise CheckpointError(
                f"{files.root} is in use by {_name(holder)}, heard {max(time.time() - holder.beat_at, 0):.0f} s ago: "
                "two runs in one folder would overwrite each other. Stop that one, or give this run another name "
                "(name=...)."
            )
        if watched > STALE_SECONDS:
            with _locked(files.lock):
                return _next(files, nodes)
        time.sleep(_POLL_SECONDS)


def _next(files: RunFiles, nodes: Nodes) -> Lease:
    """The lease of the next generation, in place."""
    mine = Holder(
        generation=next_generation(files),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=_started(os.getpid()),
        machine=_machine(),
        job=nodes.job,
        restart=nodes.restart,
        beat_at=time.time(),
        released=False,
    )
    _write(files.lease, mine)
    return Lease(files.lease, mine, is_taker=True)


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(REFRESH_SECONDS):
        try:
            lease.refresh()
        except CheckpointError:
            return  # a later start has the run; the next save will say so


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the lease. Raises MachineError if it cannot be had: it is never held for longer than a write."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise MachineError(
                        f"{path} has been locked for {_LOCK_SECONDS:g} s: by a process that was stopped, or by a node "
                        "that is gone and that the file system still waits for."
                    ) from error
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                raise MachineError(
                    f"{path} cannot be locked: {error.strerror}. Set runs_dir to a file system with flock "
                    "(Lustre: mount option flock or localflock)."
                ) from error
        yield


def _may_live(holder: Holder, nodes: Nodes) -> bool:
    """Whether the holder may still be at work."""
    is_same_job = holder.job is not None and holder.job == nodes.job
    if holder.released or (is_same_job and nodes.restart > holder.restart):
        # Slurm has started the same job again: it holds the earlier start for dead, and so do we.
        return False
    if holder.machine == _machine():
        return holder.pid != os.getpid() and holder.pid_started == _started(holder.pid)
    return not is_same_job and time.time() - holder.beat_at < STALE_SECONDS


def _write(path: Path, holder: Holder, *, released: bool = False) -> None:
    now = Holder(**{**asdict(holder), "beat_at": time.time(), "released": released})
    write_whole(path, now.to_json())


def _name(holder: Holder) -> str:
    job = "" if holder.job is None else f", job {holder.job}"
    return f"process {holder.pid} on {holder.host}{job}"


def _started(pid: int) -> int:
    """Start of a process in clock ticks since boot, 0 if there is none of that id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if text[0] in ("Z", "X") else int(text[19])


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
