"""Every reason for which a node is unfit is found, and told with the node's name."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest

from megagrok.slurm.bandwidth import slow_nodes
from megagrok.slurm.cluster import PreflightConfig
from megagrok.slurm.journal import read_journal
from megagrok.slurm.preflight import NodeFacts, answer, judge, read_answer, read_gpus
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Desk
from tests.slurm.test_supervise import both, tell

LIMITS = PreflightConfig(min_open_files=1024, min_shm_bytes=1 << 20)
GOOD = NodeFacts(
    node="n1", host="n1", at=0.0, gpus=8, gpu_problems=[], versions={"torch": "2.13.0"}, open_files=-1,
    locked_bytes=-1, shm_bytes=1 << 30, folder_problem="",
)  # fmt: skip


def verdict(**changes: object) -> list[str]:
    """The reasons against the last of three nodes, the others being good."""
    answers = {node: dataclasses.replace(GOOD, node=node) for node in ("n1", "n2")}
    answers["n3"] = dataclasses.replace(GOOD, node="n3", **changes)
    unfit = judge(answers, {"n3": 0.1}, ["n1", "n2", "n3"], gpus_per_node=8, needs_locked_memory=True, limits=LIMITS)
    assert set(unfit) <= {"n3"}
    return unfit.get("n3", [])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gpus": 7}, "7 GPUs, needs 8"),
        ({"gpu_problems": ["GPU 3 is broken"]}, "GPU 3 is broken"),
        ({"versions": {"torch": "2.12.1"}}, "torch 2.12.1, 2 other node(s) have 2.13.0"),
        ({"versions": {}}, "torch none, 2 other node(s) have 2.13.0"),
        ({"versions": {"torch": "2.13.0", "driver": "1"}}, "driver 1, 2 other node(s) have none"),
        ({"open_files": 256}, "ulimit -n 256, needs 1024"),
        ({"locked_bytes": 65536}, "memlock 64 KiB, needs unlimited: InfiniBand pins memory"),
        ({"shm_bytes": 1000}, "/dev/shm 1,000 bytes, needs 1,048,576"),
        (
            {"folder_problem": "/x cannot be written: Read-only file system"},
            "/x cannot be written: Read-only file system",
        ),
    ],
)
def test_a_node_that_differs_is_named_with_its_reason(changes: dict[str, object], text: str) -> None:
    assert verdict(**changes) == [text]


def test_good_nodes_are_good_and_silent_ones_are_not() -> None:
    assert verdict() == []
    unfit = judge({}, {}, ["n1"], gpus_per_node=0, needs_locked_memory=False, limits=LIMITS)
    assert unfit == {"n1": ["no answer within 180 s"]}


@pytest.mark.parametrize("skew", [2.1, -2.1, 3600.0])
def test_a_clock_that_is_off_is_told(skew: float) -> None:
    unfit = judge({"n1": GOOD}, {"n1": skew}, ["n1"], gpus_per_node=8, needs_locked_memory=False, limits=LIMITS)
    assert unfit == {"n1": [f"clock {skew:+.1f} s off, needs within 2 s: check NTP"]}


def test_an_answer_survives_its_journey_and_nothing_else_is_one() -> None:
    assert read_answer("2: " + answer(GOOD)) == GOOD
    for line in ("", "hello", "megagrok-preflight", "megagrok-preflight {}", 'megagrok-preflight {"node": "n1"}', "x{"):
        assert read_answer(line) is None


def test_what_nvidia_smi_prints_is_read() -> None:
    good = "NVIDIA H100 80GB HBM3, 550.54, 0, Not Active, Not Active\n"
    assert read_gpus(good * 2) == (2, [], {"GPU": "NVIDIA H100 80GB HBM3", "driver": "550.54"})
    bad = "NVIDIA H100 80GB HBM3, 550.54, 3, Not Active, Not Active\nH200, 550.54, [N/A], Active, Active\n"
    count, problems, same = read_gpus(bad)
    assert count == 2 and same["GPU"] == "H200, NVIDIA H100 80GB HBM3"
    assert problems == [
        "GPU 0 has 3 uncorrected ECC errors: reset or replace it",
        "GPU 1 is slowed down by its hardware (heat)",
    ]


@pytest.mark.parametrize(("count", "needed"), [(3, 2), (4, 4), (5, 4), (8, 7), (9, 9)])
def test_a_slow_node_is_found_among_any_number_and_no_other(count: int, needed: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    for culprit in nodes:
        measured: list[tuple[str, ...]] = []

        def measure(
            some: Sequence[str], number: int, culprit: str = culprit, measured: list[tuple[str, ...]] = measured
        ) -> float:
            measured.append(tuple(some))
            return 1.0 if culprit in some else 10.0

        found = slow_nodes(nodes, needed, measure, 5.0)
        assert set(found) == ({culprit} if culprit in nodes[:needed] else set())
        assert len(measured) in (1, 1 + count)


def test_a_slow_network_blames_no_single_node_and_two_nodes_blame_each_other() -> None:
    nodes = ["n1", "n2", "n3", "n4"]
    found = slow_nodes(nodes, 4, lambda some, number: 10.0 if len(some) == 2 else 1.0, 5.0)
    assert found == {node: ["1 GB/s with all 4 nodes, needs 5 GB/s"] for node in nodes}
    assert set(slow_nodes(nodes[:2], 2, lambda some, number: None, 5.0)) == {"n1", "n2"}
    assert slow_nodes(nodes, 4, lambda some, number: 5.0, 5.0) == {}
    assert set(itertools.chain(*slow_nodes(nodes[:2], 2, lambda some, number: None, 5.0).values())) == {
        "no connection with 2 nodes together, needs 5 GB/s"
    }


@pytest.mark.slow
def test_a_node_with_a_slow_cable_is_measured_named_and_replaced(cluster: Cluster, desk: Desk) -> None:
    if not cluster.has_own_nodes:
        pytest.skip("a cable can be slowed down only where nodes have namespaces of their own")
    shape = ("tc", "qdisc", "{}", "dev", "v2", "root", "tbf", "rate", "200mbit", "burst", "64k", "latency", "50ms")
    cluster.output(*(word.format("add") for word in shape))
    try:
        site = "preflight:\n  min_shm_bytes: 1_048_576\n  min_open_files: 256\n  min_bandwidth_gb_per_second: 0.06"
        site += "\nenvironment:\n  OMP_NUM_THREADS: 1"
        story = tell(cluster, desk, both(code=0), site=site)
        cluster.wait_for(story.job, "COMPLETED", "FAILED", limit_seconds=240)
    finally:
        cluster.call("tc", "qdisc", "delete", "dev", "v2", "root")
    (found,) = [line for line in read_journal(story.files) if line.event == "preflight"]
    assert found.words("unfit") == ["node2"], story.log()
    assert "node2: 0.0" in found.text and "with either neighbour, needs 0.06 GB/s" in found.text
    assert story.lines("attempt")[0].words("nodes") == ["node1", "node3"]
