"""Launchers of several nodes meet, agree, and fork ranks that form one process group. Nodes are processes here."""

import multiprocessing
import socket
import time
from pathlib import Path

import pytest

from megagrok.errors import MachineError, RankError
from megagrok.parallel import launch
from megagrok.parallel.crew import interface_towards, meet
from megagrok.parallel.placement import Nodes
from megagrok.parallel.ranks import Ranks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def node(index: int, count: int, port: int, folder: Path) -> None:
    nodes = Nodes(index=index, count=count, address="127.0.0.1", port=port, job="7")
    with meet(nodes, timeout_seconds=20) as crew:
        seen = crew.gather([index, "héllo"])
        assert crew.any(index == 1) and not crew.any(False)
        sums = launch.run_ranks(sum_of_ranks, 2 * count, timeout_seconds=20, nodes=nodes)
        (folder / str(index)).write_text(f"{seen} {sums}", encoding="utf-8")


def sum_of_ranks(ranks: Ranks) -> tuple[int, int]:
    return ranks.rank, sum(int(str(rank)) for rank in ranks.gather(ranks.rank))


def test_launchers_agree_and_their_ranks_are_one_group(tmp_path: Path) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=node, args=(index, 2, port, tmp_path)) for index in range(2)]
    for process in reversed(processes):
        process.start()
        time.sleep(0.2)  # node 0 comes last: the others wait for it
    for process in processes:
        process.join(timeout=40)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [(tmp_path / str(index)).read_text(encoding="utf-8") for index in range(2)] == [
        "[[0, 'héllo'], [1, 'héllo']] [(0, 6), (1, 6)]",
        "[[0, 'héllo'], [1, 'héllo']] [(2, 6), (3, 6)]",
    ]


def test_a_node_that_never_comes_is_named() -> None:
    nodes = Nodes(index=0, count=3, address="127.0.0.1", port=free_port(), job="7")
    with (
        pytest.raises(RankError, match="waited 0.5 s for the launchers of nodes 1, 2"),
        meet(nodes, timeout_seconds=0.5),
    ):
        raise AssertionError("nobody came")


def test_a_node_0_that_cannot_be_reached_is_named_by_its_address() -> None:
    port = free_port()
    with (
        pytest.raises(RankError, match=f"node 1 of 2 cannot reach node 0 at 127.0.0.1:{port} within 0.5 s"),
        meet(Nodes(index=1, count=2, address="127.0.0.1", port=port), timeout_seconds=0.5),
    ):
        raise AssertionError("nobody is there")


def test_a_port_that_is_taken_may_be_free_at_the_next_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nodes = Nodes(index=0, count=2, address="127.0.0.1", port=taken.getsockname()[1])
        with (
            pytest.raises(RankError, match="node 0 cannot listen at 127.0.0.1:.*Set MASTER_PORT"),
            meet(nodes, timeout_seconds=5),
        ):
            raise AssertionError("it is not ours")


def test_an_address_without_a_name_behind_it_is_refused() -> None:
    with (
        pytest.raises(MachineError, match="cannot resolve its own address no-such-node.invalid"),
        meet(Nodes(index=0, count=2, address="no-such-node.invalid", port=1), timeout_seconds=5),
    ):
        raise AssertionError("it does not exist")


def test_the_store_listens_at_its_address_only() -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(port,))
    process.start()
    try:
        deadline = time.monotonic() + 10
        while f":{port:04X}" not in (table := Path("/proc/net/tcp").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert f" 0100007F:{port:04X} " in table
        assert f" 00000000:{port:04X} " not in table + Path("/proc/net/tcp6").read_text()
    finally:
        process.terminate()
        process.join()


def hold(port: int) -> None:
    with meet(Nodes(index=0, count=2, address="127.0.0.1", port=port), timeout_seconds=30):
        return


def test_the_interface_towards_this_machine_is_loopback() -> None:
    assert interface_towards("127.0.0.1", 80) == "lo"
