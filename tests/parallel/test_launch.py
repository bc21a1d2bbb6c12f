"""Forked ranks: the cause is reported, nobody hangs, nothing is left behind, and a stop signal is theirs to answer."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megagrok import errors
from megagrok.errors import CheckpointError, ConfigError, MachineError, MegagrokError, RankError
from megagrok.parallel import launch
from megagrok.parallel.launch import join
from megagrok.parallel.placement import Placement
from megagrok.parallel.ranks import Ranks

OWN_ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MegagrokError)]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Around every test: no temporary file, no open descriptor, no child, no handler of ours remains."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    descriptors = len(os.listdir("/proc/self/fd"))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert os.listdir(tmp_path / "temporary") == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert multiprocessing.active_children() == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)


# What ranks return


@dataclass
class Nested:
    """A result with tensors in it, as engines return them."""

    tensors: dict[str, torch.Tensor]


def tensors_of_every_kind(ranks: Ranks) -> tuple[int, Nested]:
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(dtype): (torch.arange(6).reshape(2, 3) + ranks.rank).to(dtype).T for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(torch.ones(2))}
    return ranks.rank, Nested(tensors)


def test_results_come_back_in_rank_order_and_tensors_by_value() -> None:
    results = run_ranks(tensors_of_every_kind, 3)
    assert [rank for rank, _ in results] == [0, 1, 2]
    for rank, nested in results:
        for name, tensor in nested.tensors.items():
            assert not tensor.is_shared()
            if name.startswith("torch."):
                assert str(tensor.dtype) == name
                assert torch.equal(tensor, (torch.arange(6).reshape(2, 3) + rank).to(tensor.dtype).T)
        assert nested.tensors["empty"].shape == (0, 3)
        assert nested.tensors["scalar"].item() == 2.5
        assert nested.tensors["parameter"].tolist() == [1.0, 1.0]


def large(ranks: Ranks) -> torch.Tensor:
    return torch.full((4_000_000,), float(ranks.rank))


def test_results_larger_than_a_pipe_come_back_whole() -> None:
    assert [int(result.sum()) for result in run_ranks(large, 2)] == [0, 4_000_000]


def closures_work(ranks: Ranks, captured: Callable[[], int]) -> int:
    return captured() + ranks.rank


def test_arguments_are_inherited_and_may_be_anything() -> None:
    assert launch.run_ranks(closures_work, 2, lambda: 40, timeout_seconds=20) == [40, 41]


def unsendable(ranks: Ranks) -> Callable[[], int]:
    return (lambda: 1) if ranks.rank == 1 else sum


def test_a_result_that_cannot_be_sent_is_its_ranks_failure() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed first, at .*lambda"):
        run_ranks(unsendable, 2)


def last_words_in_a_pair(ranks: Ranks) -> tuple[float, bool]:
    pair = dist.new_group([1, 2])
    pids = ranks.gather(os.getpid())
    if ranks.rank == 0:
        return 0.0, True
    time.sleep(0.5)
    total = torch.ones(1)
    dist.all_reduce(total, group=pair)
    return total.item(), is_alive(pids[0])


def test_a_rank_that_is_done_stays_connected_until_all_are() -> None:
    assert run_ranks(last_words_in_a_pair, 3) == [(0.0, True), (2.0, True), (2.0, True)]


# Which failure is told


def fails_while_others_wait(ranks: Ranks, *, culprit: int) -> None:
    if ranks.rank == culprit:
        raise ZeroDivisionError("the cause")
    try:
        ranks.barrier()
    except RuntimeError as error:
        raise ValueError("the echo") from error


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_the_first_failure_is_told_and_not_its_echo(culprit: int) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(fails_while_others_wait, 3, culprit=culprit)
    message = str(caught.value)
    assert f"rank {culprit} of 3 failed first" in message
    assert "ZeroDivisionError: the cause" in message
    assert 'raise ZeroDivisionError("the cause")' in message, "the traceback is missing"
    assert "echo" not in message


def dies_while_others_wait(ranks: Ranks, *, how: signal.Signals) -> None:
    if ranks.rank == 1:
        signal.signal(how, signal.SIG_DFL) if how != signal.SIGKILL else None
        os.kill(os.getpid(), how)
    ranks.barrier()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_rank_that_a_signal_killed_is_told_as_such(how: signal.Signals) -> None:
    with pytest.raises(RankError, match=rf"rank 1 of 3 was killed by {how.name} at \d\d:\d\d:\d\d"):
        run_ranks(dies_while_others_wait, 3, how=how)


def leaves_without_a_word(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)
    ranks.barrier()


def test_a_rank_that_left_without_a_report_is_told_as_such() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 ended with status 3 and without a report"):
        run_ranks(leaves_without_a_word, 2)


def dies_while_others_are_busy(ranks: Ranks) -> None:
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def test_ranks_that_hear_nothing_of_a_failure_are_gone_within_five_seconds() -> None:
    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 2 of 3 was killed by SIGKILL"):
        launch.run_ranks(dies_while_others_are_busy, 3, timeout_seconds=60, on_started=pids.extend)
    assert time.monotonic() - start < 5
    assert len(pids) == 3
    assert not any(map(is_alive, pids))


def cleans_up(ranks: Ranks, *, folder: Path) -> None:
    try:
        if ranks.rank == 0:
            raise ValueError("stop")
        ranks.barrier()
    finally:
        time.sleep(0.2)
        (folder / str(ranks.rank)).touch()


def test_ranks_unwind_after_a_failure_before_they_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0"):
        run_ranks(cleans_up, 2, folder=tmp_path)
    assert {"0", "1"} <= set(os.listdir(tmp_path))


def skips_a_collective(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(600)
    ranks.barrier()


def test_a_collective_that_a_peer_never_calls_fails_after_its_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 failed first"):
        run_ranks(skips_a_collective, 2, timeout_seconds=1.0)
    assert time.monotonic() - start < 10


def raises(ranks: Ranks, *, kind: type[MegagrokError]) -> None:
    raise kind("model.hidden is 7: must be even")


@pytest.mark.parametrize("kind", OWN_ERRORS)
def test_an_error_of_ours_keeps_its_class_its_exit_code_and_its_words(kind: type[MegagrokError]) -> None:
    with pytest.raises(kind) as caught:
        run_ranks(raises, 2, kind=kind)
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code
    assert str(caught.value) == "model.hidden is 7: must be even"
    assert "of 2 at" in caught.value.__notes__[0]


class TornCheckpoint(CheckpointError):
    """A kind of error that only a room of the house knows."""


def test_an_error_that_only_a_room_knows_comes_back_as_the_kind_of_it_that_everyone_knows() -> None:
    with pytest.raises(CheckpointError) as caught:
        run_ranks(raises, 1, kind=TornCheckpoint)
    assert type(caught.value) is CheckpointError


def exits(ranks: Ranks, *, codes: list[int]) -> None:
    if codes[ranks.rank] != 0:
        time.sleep(0.3 * ranks.rank)
        sys.exit(codes[ranks.rank])


def test_ranks_that_all_leave_with_one_exit_code_pass_it_on() -> None:
    with pytest.raises(SystemExit) as caught:
        run_ranks(exits, 3, codes=[76, 76, 76])
    assert caught.value.code == 76


def test_ranks_that_leave_in_different_ways_are_a_failure() -> None:
    with pytest.raises(RankError, match="in rank order: exit 76, returned; all must"):
        run_ranks(exits, 2, codes=[76, 0])


# Signals to the parent. The parent is a process of its own here: `launched` forks it, and it forks the ranks.


def launched(fn: Callable[..., None], folder: Path, world_size: int = 2) -> BaseProcess:
    """A process that runs ranks, whose ids it writes to `folder`, and ends with their exit code or 1."""

    def parent() -> None:
        os.setpgid(0, 0)

        def note(pids: list[int]) -> None:
            (folder / "started").write_text(" ".join(map(str, pids)))

        try:
            launch.run_ranks(fn, world_size, folder, timeout_seconds=60, on_started=note)
        except RankError as error:
            (folder / "error").write_text(str(error))
            raise SystemExit(error.exit_code) from error

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in range(world_size)))
    return process


def rank_pids(folder: Path) -> list[int]:
    wait_for((folder / "started").exists)
    wait_for(lambda: bool((folder / "started").read_text()))
    return [int(pid) for pid in (folder / "started").read_text().split()]


def finish(process: BaseProcess) -> int | None:
    process.join(20)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def saves_when_told(ranks: Ranks, folder: Path) -> None:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    (folder / f"ready{ranks.rank}").touch()
    while not ranks.any(bool(received)):
        time.sleep(0.02)
    time.sleep(0.5 * ranks.rank)
    (folder / f"saved{ranks.rank}").write_text(f"{len(received)}")
    sys.exit(76)


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the parent", "to its group, as a terminal does"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_each_rank_once_and_the_parent_waits_for_their_save(
    number: signal.Signals, send: Callable[[int, int], None], tmp_path: Path
) -> None:
    process = launched(saves_when_told, tmp_path)
    send(rank_parent(process), number)
    assert finish(process) == 76
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["1", "1"]


def rank_parent(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def never_stops(ranks: Ranks, folder: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (folder / f"told{ranks.rank}").touch())
    (folder / f"ready{ranks.rank}").touch()
    while True:
        time.sleep(0.05)


def test_a_second_stop_signal_kills_the_ranks(tmp_path: Path) -> None:
    process = launched(never_stops, tmp_path)
    pids = rank_pids(tmp_path)
    os.kill(rank_parent(process), signal.SIGTERM)
    wait_for(lambda: all((tmp_path / f"told{rank}").exists() for rank in range(2)))
    assert all(map(is_alive, pids))
    os.kill(rank_parent(process), signal.SIGINT)
    assert finish(process) == RankError.exit_code
    assert "a second signal (SIGINT)" in (tmp_path / "error").read_text()
    assert not any(map(is_alive, pids))


def test_ranks_do_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    process = launched(never_stops, tmp_path)
    pids = rank_pids(tmp_path)
    process.kill()
    finish(process)
    try:
        wait_for(lambda: not any(map(is_alive, pids)), seconds=5)
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
    for leftover in Path(tempfile.gettempdir()).glob("megagrok-ranks-*"):  # a killed parent cannot tidy up
        (leftover / "rendezvous").unlink()
        leftover.rmdir()


# Joining the ranks of a launcher


def joined(rank: int, port: int, folder: Path) -> None:
    ranks = join(Placement(rank, 2, rank, "127.0.0.1", port), backend="gloo", timeout_seconds=20)
    (folder / str(rank)).write_text(str(ranks.gather([ranks.rank, os.environ["LOCAL_RANK"]])))
    ranks.barrier()


def test_processes_that_a_launcher_started_find_each_other(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=joined, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    assert [finish(process) for process in processes] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[[0, '0'], [1, '1']]"] * 2


def test_peers_that_cannot_be_met_are_refused_with_the_address_that_was_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(MachineError, match=rf"rank 1 of 2 did not meet its peers at 127.0.0.1:{port} within 1 s"):
        run_ranks(meets_nobody, 1, port=port)


def meets_nobody(ranks: Ranks, *, port: int) -> None:
    dist.destroy_process_group()
    join(Placement(1, 2, 1, "127.0.0.1", port), backend="gloo", timeout_seconds=1)


TORCHRUN_PROGRAM = """
from megagrok.parallel.launch import join
from megagrok.parallel.placement import discover
placement = discover()
ranks = join(placement, backend="gloo", timeout_seconds=60)
gathered = ranks.gather(placement.rank)
if ranks.rank == 0:
    print(gathered)
"""


@pytest.mark.slow
def test_torchrun_itself_is_joined(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert "[0, 1]" in done.stdout, done.stderr


def test_no_ranks_at_all_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks(raises, 0, kind=ConfigError)
