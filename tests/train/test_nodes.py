"""A run over two nodes is the run of one node, bit by bit. The nodes are two launchers on this machine, started as srun
starts them; tests/slurm starts them on a real cluster."""

import os
import signal
import socket
from pathlib import Path

import pytest

from megagrok.errors import EXIT_TRANSIENT
from megagrok.train.attempt import read_attempts
from megagrok.train.files import RunFiles
from tests.train.commands import Command, Done, assert_same_run, steps_in, wait_until
from tests.train.conftest import FOUR_RANKS, Untouched


def start_node(index: int, port: int, config: Path, folder: Path, *settings: str) -> Command:
    environment = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": str(index),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return Command("train", config, *FOUR_RANKS, *settings, folder=folder, environment=environment)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_two_nodes_train_what_one_node_trains(config: Path, untouched: Untouched, port: int, tmp_path: Path) -> None:
    nodes = [start_node(index, port, config, tmp_path) for index in range(2)]
    done: list[Done] = [node.wait() for node in nodes]
    assert [node.status for node in done] == [0, 0], done[0].err + done[1].err
    files = RunFiles(tmp_path / "runs" / "law")
    assert_same_run(files, untouched.files, 8)
    (attempt,) = read_attempts(files.root)
    assert [[rank.rank for rank in page.ranks] for page in attempt.nodes] == [[0, 1], [2, 3]]
    logs = [files.root / "attempts" / "00001" / f"rank-{rank:05d}.log" for rank in range(4)]
    assert [log.read_text().splitlines()[0].startswith(f"# rank {rank} on ") for rank, log in enumerate(logs)] == [
        True
    ] * 4
    assert "step 8/8" in logs[0].read_text()
    assert "law: 8 steps done." in done[0].out and done[1].out == ""


def test_a_rank_that_dies_on_one_node_ends_all_and_is_found_among_their_pages(
    config: Path, port: int, tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    nodes = [start_node(index, port, config, tmp_path) for index in range(2)]
    wait_until(lambda: 3 in steps_in(files), nodes[0])
    os.kill(nodes[1].ranks()[1], signal.SIGKILL)
    assert [node.wait().status for node in nodes] == [EXIT_TRANSIENT] * 2
    (attempt,) = read_attempts(files.root)
    assert attempt.ending is not None
    assert (attempt.ending.rank, attempt.ending.is_node_suspect) == (3, True)
    assert [node.survivors() for node in nodes] == [[], []]


def test_what_node_0_refuses_ends_every_node_with_the_same_status(config: Path, port: int, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "law" / "checkpoints"
    path.parent.mkdir(parents=True)
    path.write_text("a file stands here")
    nodes = [start_node(index, port, config, tmp_path) for index in range(2)]
    assert [node.wait().status for node in nodes] == [5, 5]
    endings = [page.ending for attempt in read_attempts(path.parent) for page in attempt.nodes]
    assert {ending.exit_code for ending in endings if ending is not None} == {5}
