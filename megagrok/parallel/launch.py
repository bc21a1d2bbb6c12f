"""How ranks come to be: forked here on one machine, or started by torchrun or srun and joined.

Not the layout of the ranks (topology.py) and not what they do. The only file that touches the process environment.

The one idea: start the expensive thing once. Importing Megatron and DeepSpeed takes seconds, so the *caller* imports
them and then forks ranks that have them already. Two rules follow for the caller of `run_ranks`: call it from the main
thread, and before any torch operation that runs in parallel (a matrix product, a backward pass) or touches a GPU:
OpenMP and CUDA do not survive a fork.
"""

import os
import re
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
from types import FrameType
from typing import Literal, TypeVar, TypeVarTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # documented, but not in __all__

from megagrok import errors
from megagrok.errors import MachineError, MegagrokError, RankError
from megagrok.parallel.forked import LEAVE_SECONDS, STOP_SIGNALS, Died, Ending, Exited, Failure, ForkedRank, Returned
from megagrok.parallel.ranks import ProcessGroupRanks

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_POLL_SECONDS = 0.1


def run_ranks(
    fn: Callable[[ProcessGroupRanks, *Ts], T],
    world_size: int,
    *args: *Ts,
    timeout_seconds: float,
    threads_per_rank: int = 1,
    on_started: Callable[[list[int]], None] | None = None,
) -> list[T]:
    """Run fn(ranks, *args) in `world_size` forked processes that form a gloo process group; results in rank order.

    timeout_seconds: for one collective, not for the run: a call that a peer never makes fails after it.
    threads_per_rank: torch threads in each rank; above 1 only if this process never ran torch in parallel.
    on_started: gets the ranks' process ids, before their results are waited for.
    Results cross a pipe by value (tensors are copied, not shared); fn and args are inherited and may be anything.
    SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks once, and the ranks decide; a second one kills them.
    Raises the earliest failure of all ranks: a MegagrokError as its own class, so that its exit code survives;
    anything else, a death by signal too, as RankError with the rank and its traceback. The others are stopped within
    seconds. If every rank left by SystemExit with one code, raises SystemExit with it.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, must be at least 1")
    with tempfile.TemporaryDirectory(prefix="megagrok-ranks-") as folder:
        store = os.path.join(folder, "rendezvous")

        def body(rank: int) -> Callable[[], T]:
            def run() -> T:
                ranks = _join_local(rank, world_size, store, timeout_seconds, threads_per_rank)
                return fn(ranks, *args)

            return run

        team: list[ForkedRank] = []
        with _forwarding(team) as received:
            try:
                with _blocked_signals():
                    for rank in range(world_size):
                        team.append(ForkedRank(f"megagrok-rank-{rank}", body(rank)))
                if on_started is not None:
                    on_started([member.pid for member in team])
                _watch(team)
            finally:
                for member in team:
                    member.reap()
    return cast(list[T], _outcome([member.ending for member in team], received))


@dataclass(frozen=True, slots=True)
class Placement:
    """This process as its launcher placed it. `address` and `port` are where rank 0 can be met."""

    rank: int
    world_size: int
    local_rank: int
    launcher: Literal["torchrun", "srun"]
    address: str
    port: int


def discover(environment: Mapping[str, str] = os.environ) -> Placement | None:
    """Which launcher started this process, and as which rank; None if none did and ranks are to be forked.

    torchrun is recognised by RANK with MASTER_ADDR, and wins where both are present (torchrun inside srun).
    A Slurm step of one task has no peers to join and counts as none, as does a batch script, which is not a step.
    Raises MachineError, naming every variable that is missing or no number.
    """
    if "RANK" in environment and "MASTER_ADDR" in environment:
        rank, world_size, local_rank, port = _numbers(
            "torchrun", environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
        )
        return Placement(rank, world_size, local_rank, "torchrun", environment["MASTER_ADDR"], port)
    if "SLURM_STEP_ID" not in environment or environment.get("SLURM_NTASKS") == "1":
        return None
    rank, world_size, local_rank, job = _numbers(
        "srun", environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"
    )
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    port = int(environment.get("MASTER_PORT", 20000 + job % 20000))
    return Placement(rank, world_size, local_rank, "srun", address, port)


def join(
    placement: Placement, *, backend: str, timeout_seconds: float, device: torch.device | None = None
) -> ProcessGroupRanks:
    """Form the default process group with the peers that the launcher started. Every rank calls it, once.

    backend: "gloo" or "nccl", as megagrok.platform says.  device: this rank's GPU for nccl, None for gloo.
    timeout_seconds: for the meeting and for every collective after it.
    Raises MachineError if the peers cannot be met.
    """
    os.environ["LOCAL_RANK"] = str(placement.local_rank)  # DeepSpeed's engine reads it; torchrun sets it, srun does not
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
            f"rank {placement.rank} of {placement.world_size} ({placement.launcher}) did not meet its peers at {where} "
            f"within {timeout_seconds:g} s: {error}. Check that every node resolves and reaches that address, "
            "or set MASTER_ADDR and MASTER_PORT."
        ) from error
    return ProcessGroupRanks(device=device)


def _join_local(rank: int, world_size: int, store: str, timeout_seconds: float, threads: int) -> ProcessGroupRanks:
    """Runs in the forked rank. No ports are chosen: the ranks meet in a file, and gloo takes what the kernel gives."""
    torch.set_num_threads(threads)
    # DeepSpeed's engine asks for LOCAL_RANK and finds no argument for it.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if sys.platform == "linux":
        # Peers are on this machine: its host name need not resolve, and no other machine may connect.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        store=FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    ranks = ProcessGroupRanks()
    # Nobody may fail, and close its connections, while a peer is still making them.
    ranks.barrier()
    return ranks


def _watch(team: Sequence[ForkedRank]) -> None:
    """Return when every rank has ended, or LEAVE_SECONDS after the first failure, so that the others can unwind."""
    deadline: float | None = None
    while running := [member for member in team if member.ending is None]:
        if deadline is not None and time.monotonic() > deadline:
            return
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


def _outcome(endings: Sequence[Ending | None], received: Sequence[int]) -> list[object]:
    """The values in rank order, or the one error that explains why there are none."""
    if len(received) > 1:
        name = signal.Signals(received[-1]).name
        raise RankError(
            f"a second signal ({name}) came before the ranks had ended; they were killed, unsaved work is lost"
        )
    failures = [(ending.at, rank, ending) for rank, ending in enumerate(endings) if isinstance(ending, Failure)]
    if failures:
        _, rank, first = min(failures, key=lambda failure: failure[:2])
        raise _as_error(first, rank, len(endings), received)
    codes = [ending.code for ending in endings if isinstance(ending, Exited)]
    if codes and codes == [codes[0]] * len(endings):
        raise SystemExit(codes[0])
    if codes:
        how = [f"exit {ending.code}" if isinstance(ending, Exited) else "returned" for ending in endings]
        raise RankError(f"the ranks ended differently, in rank order: {', '.join(how)}; all must return, or exit alike")
    return [ending.value for ending in endings if isinstance(ending, Returned)]


def _as_error(first: Failure, rank: int, world_size: int, received: Sequence[int]) -> BaseException:
    at = time.strftime("%H:%M:%S", time.localtime(first.at)) + f".{int(first.at % 1 * 1000):03d}"
    if isinstance(first, Died):
        asked = f", after {signal.Signals(received[0]).name} was passed on to it" if received else ""
        return RankError(f"rank {rank} of {world_size} {first.how} at {at}{asked}; the other ranks were stopped")
    if first.error == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = vars(errors).get(first.error)
    if isinstance(kind, type) and issubclass(kind, MegagrokError):
        error: MegagrokError = kind(first.message)
        error.add_note(f"First on rank {rank} of {world_size} at {at}:\n{first.trace}")
        return error
    return RankError(
        f"rank {rank} of {world_size} failed first, at {at}: {first.error}: {first.message}\n{first.trace}"
    )


@contextmanager
def _forwarding(team: Sequence[ForkedRank]) -> Iterator[list[int]]:
    """Pass stop signals on to `team`, the second time as SIGKILL; yields the signals that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for member in team:
            member.signal(number if len(received) == 1 else signal.SIGKILL)

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


def _numbers(launcher: str, environment: Mapping[str, str], *names: str) -> list[int]:
    wrong = [f"{name}={environment.get(name)}" for name in names if not environment.get(name, "").isdecimal()]
    if wrong:
        raise MachineError(
            f"this process looks started by {launcher}, but {', '.join(wrong)}: each must be a whole number. "
            f"Start it with {launcher}, or unset the variables to fork the ranks here."
        )
    return [int(environment[name]) for name in names]


def _first_host(environment: Mapping[str, str]) -> str:
    """Task 0's host: the first of Slurm's node list, as in node[07-12,20],other3. One node meets on itself."""
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise MachineError(
            "started by srun, but SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the address of rank 0's node"
        )
    return first[1] + (first[2] or "")
