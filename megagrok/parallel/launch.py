"""How ranks come to be: forked by the launcher of their node, or started by torchrun and joined.

Not the layout of the ranks (topology.py) and not what they do. With placement.py, which reads it, the only file that
touches the process environment.

The one idea: start the expensive thing once. Importing Megatron and DeepSpeed takes seconds, so the *caller* imports
them and then forks ranks that have them already. Two rules follow for the caller of `run_ranks`: call it from the main
thread, and before any torch operation that runs in parallel (a matrix product, a backward pass) or touches a GPU:
OpenMP and CUDA do not survive a fork.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import TypeVar, TypeVarTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]  # documented, not in __all__

from megagrok import errors
from megagrok.errors import MachineError, MegagrokError, RankBugError, RankError
from megagrok.parallel.crew import interface_towards, reach_store
from megagrok.parallel.forked import LEAVE_SECONDS, STOP_SIGNALS, Died, Ending, Exited, Failure, ForkedRank, Returned
from megagrok.parallel.placement import Nodes, Placement
from megagrok.parallel.ranks import ProcessGroupRanks
from megagrok.parallel.watch import Hang, Watch
from megagrok.platform import CPU, find_platform, num_gpus

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HERE = Nodes()
"""One machine, and this process its launcher."""
_POLL_SECONDS = 0.1
# What libraries, devices and networks raise when something breaks is a RuntimeError or an OSError.
_BUGS = frozenset(
    kind.__name__
    for kind in (
        AssertionError, AttributeError, ImportError, IndexError, KeyError, NameError, NotImplementedError, TypeError,
        UnboundLocalError, ValueError,
    )
)  # fmt: skip


def count_gpus() -> int:
    """GPUs of this machine, asked in a way after which ranks can still be forked; 0 without a driver."""
    # Asked through the driver's library instead, CUDA would be started here and broken in every forked rank.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return num_gpus()


def run_ranks(
    fn: Callable[[ProcessGroupRanks, *Ts], T],
    world_size: int,
    *args: *Ts,
    timeout_seconds: float,
    threads_per_rank: int = 1,
    on_started: Callable[[list[int]], None] | None = None,
    nodes: Nodes = HERE,
    log_of: Callable[[int], Path] | None = None,
    watch: Watch | None = None,
    on_gpus: bool = False,
) -> list[T]:
    """Run fn(ranks, *args) in forked processes that form a process group; this node's results in rank order.

    timeout_seconds: for one collective, not for the run: a call that a peer never makes fails after it.
    threads_per_rank: torch threads in each rank; above 1 only if this process never ran torch in parallel.
    on_started: gets the ranks' process ids, before their results are waited for.
    nodes: where this process stands among the launchers of all nodes; each calls this once and forks its share of the
    `world_size` ranks. Between nodes the ranks meet in the store that node 0's launcher holds (crew.py).
    log_of: the file to which a rank's output is appended; without it ranks share this process's output.
    watch: what finds a rank that hangs; its ranks are this node's.
    on_gpus: each rank takes the GPU of its local number and speaks NCCL; otherwise all are on the CPU and speak gloo.
    Results cross a pipe by value (tensors are copied, not shared); fn and args are inherited and may be anything.
    SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, and the ranks decide; a SIGINT (Ctrl-C) after another
    signal kills them.
    Raises the earliest failure of all ranks: a MegagrokError as its own class, so that its exit code survives;
    anything else, a death by signal too, as RankError with the rank and its traceback. The others are stopped within
    seconds. If every rank left by SystemExit with one code, raises SystemExit with it.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, must be at least 1")
    mine = nodes.local_ranks(world_size)
    with tempfile.TemporaryDirectory(prefix="megagrok-ranks-") as folder:
        meeting = _Meeting(world_size, mine, os.path.join(folder, "rendezvous"), nodes, timeout_seconds, on_gpus)

        def body(rank: int) -> Callable[[], T]:
            def run() -> T:
                return fn(_join_as_forked(rank, meeting, threads_per_rank), *args)

            return run

        if watch is not None:
            watch.folder = Path(folder)
        team: list[ForkedRank] = []
        with _forwarding(team) as received:
            try:
                with _blocked_signals():
                    for rank in mine:
                        log = None if log_of is None else log_of(rank)
                        stack_file = None if watch is None else watch.stack_file(rank)
                        team.append(ForkedRank(f"megagrok-rank-{rank}", body(rank), log=log, stack_file=stack_file))
                if on_started is not None:
                    on_started([member.pid for member in team])
                hang = _watch(team, mine, watch)
            finally:
                for member in team:
                    member.reap()
    if hang is not None:
        raise _as_rank_error(hang)
    return cast(list[T], _outcome({rank: team[index].ending for index, rank in enumerate(mine)}, world_size, received))


def join(
    placement: Placement, *, backend: str, timeout_seconds: float, device: torch.device | None = None
) -> ProcessGroupRanks:
    """Form the default process group with the peers that torchrun started. Every rank calls it, once.

    backend: "gloo" or "nccl", as megagrok.platform says.  device: this rank's GPU for nccl, None for gloo.
    timeout_seconds: for the meeting and for every collective after it.
    Raises MachineError if the peers cannot be met.
    """
    os.environ["LOCAL_RANK"] = str(placement.local_rank)  # DeepSpeed's engine reads it
    where = f"{placement.address}:{placement.port}"
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{where}",
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device,
        )
    except dist.DistError as error:
        raise MachineError(
            f"rank {placement.rank} of {placement.world_size} did not meet its peers at {where} "
            f"within {timeout_seconds:g} s: {error}. Check that every node resolves and reaches that address, "
            "or set MASTER_ADDR and MASTER_PORT."
        ) from error
    return ProcessGroupRanks(device=device)


@dataclass(frozen=True, slots=True)
class _Meeting:
    """How the ranks of this node find all others."""

    world_size: int
    mine: range
    file: str
    """Where ranks of one node meet. No ports are chosen: gloo takes what the kernel gives."""
    nodes: Nodes
    timeout_seconds: float
    on_gpus: bool

    def store(self) -> Store:
        """A connection of this rank's own."""
        if self.nodes.count == 1:
            return FileStore(self.file, self.world_size)
        return PrefixStore("ranks", reach_store(self.nodes, self.timeout_seconds))

    def interface(self) -> str | None:
        """The network interface that gloo has to use."""
        if self.nodes.count == 1:
            # Peers are on this machine: its host name need not resolve, and no other machine may connect.
            return "lo" if sys.platform == "linux" else None
        return interface_towards(self.nodes.address, self.nodes.port)


def _join_as_forked(rank: int, meeting: _Meeting, threads: int) -> ProcessGroupRanks:
    """Runs in the forked rank."""
    torch.set_num_threads(threads)
    local_rank = rank - meeting.mine.start
    # DeepSpeed's engine asks for LOCAL_RANK and finds no argument for it.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(meeting.world_size), LOCAL_RANK=str(local_rank))
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := meeting.interface()) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    platform = find_platform(local_rank) if meeting.on_gpus else CPU
    device = platform.device if platform.is_cuda else None
    dist.init_process_group(
        platform.backend,
        store=meeting.store(),
        rank=rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=meeting.timeout_seconds),
        device_id=device,
    )
    ranks = ProcessGroupRanks(device=device)
    # Nobody may fail, and close its connections, while a peer is still making them.
    ranks.barrier()
    return ranks


def _watch(team: Sequence[ForkedRank], numbers: range, watch: Watch | None) -> Hang | None:
    """Return when every rank has ended, or LEAVE_SECONDS after the first failure, so that the others can unwind; or as
    soon as one hangs, with what was found."""
    deadline: float | None = None
    while running := [member for member in team if member.ending is None]:
        if deadline is not None and time.monotonic() > deadline:
            return None
        asked_at = time.time()
        is_quiet = not connection.wait([member.pipe for member in running], timeout=_POLL_SECONDS)
        for member in running:
            member.look(asked_at if is_quiet else None)
        if deadline is None and any(isinstance(member.ending, Failure) for member in running):
            deadline = time.monotonic() + LEAVE_SECONDS
        if deadline is not None:
            # Only now: the failed rank's connections close and wake the peers that wait for it.
            for member in team:
                if member.ending is not None:
                    member.release()
        elif watch is not None:
            pids = {rank: member.pid for rank, member in zip(numbers, team, strict=True) if member.ending is None}
            hang = watch.look(pids)
            if hang is not None:
                return hang
    return None


def _outcome(endings: Mapping[int, Ending | None], world_size: int, received: Sequence[int]) -> list[object]:
    """The values in rank order, or the one error that explains why there are none."""
    if signal.SIGINT in received[1:]:
        raise RankError(
            "a second signal (SIGINT) came before the ranks had ended; they were killed, unsaved work is lost"
        )
    failures = [(ending.at, rank, ending) for rank, ending in endings.items() if isinstance(ending, Failure)]
    if failures:
        _, rank, first = min(failures, key=lambda failure: failure[:2])
        raise _as_error(first, rank, world_size, received)
    codes = [ending.code for ending in endings.values() if isinstance(ending, Exited)]
    if codes and codes == [codes[0]] * len(endings):
        raise SystemExit(codes[0])
    if codes:
        how = [f"exit {ending.code}" if isinstance(ending, Exited) else "returned" for ending in endings.values()]
        raise RankError(f"the ranks ended differently, in rank order: {', '.join(how)}; all must return, or exit alike")
    return [ending.value for ending in endings.values() if isinstance(ending, Returned)]


def _as_rank_error(hang: Hang) -> RankError:
    error = RankError(f"{hang.text}\n{hang.stacks}")
    error.rank, error.is_node_suspect, error.stacks = hang.rank, hang.rank is not None, hang.stacks
    return error


def _as_error(first: Failure, rank: int, world_size: int, received: Sequence[int]) -> BaseException:
    at = time.strftime("%H:%M:%S", time.localtime(first.at)) + f".{int(first.at % 1 * 1000):03d}"
    error: MegagrokError
    if isinstance(first, Died):
        asked = f", after {signal.Signals(received[0]).name} was passed on to it" if received else ""
        error = RankError(f"rank {rank} of {world_size} {first.how} at {at}{asked}; the other ranks were stopped")
        error.is_node_suspect = True
        error.rank = rank
        return error
    if first.error == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = vars(errors).get(first.error)
    if isinstance(kind, type) and issubclass(kind, MegagrokError):
        error = kind(first.message)
        error.add_note(f"First on rank {rank} of {world_size} at {at}:\n{first.trace}")
    else:
        text = f"rank {rank} of {world_size} failed first, at {at}: {first.error}: {first.message}\n{first.trace}"
        error = RankBugError(f"{text}This is a bug of megagrok.") if first.error in _BUGS else RankError(text)
    error.rank = rank
    return error


@contextmanager
def _forwarding(team: Sequence[ForkedRank]) -> Iterator[list[int]]:
    """Pass stop signals on to `team`, the second time as SIGKILL; yields the signals that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for member in team:
            # Slurm sends SIGTERM after its warning, often in the middle of the save; only an impatient person kills.
            member.signal(signal.SIGKILL if number == signal.SIGINT and len(received) > 1 else number)

    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only: its handlers are not ours to replace.
        yield received
        return
    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold stop signals back while forking: none may meet half a team, or run the parent's handler in a rank."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
