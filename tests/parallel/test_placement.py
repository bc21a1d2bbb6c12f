"""Who started this process is read from the environment, and a start that cannot work is refused by name."""

import pytest

from megagrok.errors import MachineError
from megagrok.parallel.placement import Nodes, Placement, discover

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "4",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_RESTART_COUNT": "2",
}


def test_a_process_that_no_launcher_started_is_alone() -> None:
    assert discover({}) == Nodes()


def test_torchrun_places_ranks_and_srun_places_the_launchers_of_nodes() -> None:
    assert discover(TORCHRUN) == Placement(3, 8, 1, "node1", 29500)
    assert discover(SRUN) == Nodes(1, 3, "node07", 20000 + 70123 % 20000, "70123", 2, "4")
    assert discover(SRUN | TORCHRUN) == Placement(3, 8, 1, "node1", 29500), "torchrun inside srun"


def test_an_address_that_is_given_wins_over_the_derived_one() -> None:
    nodes = discover(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert isinstance(nodes, Nodes)
    assert (nodes.address, nodes.port) == ("10.0.0.7", 4000)


def test_a_batch_script_is_alone_and_knows_its_job() -> None:
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert discover(script) == Nodes(job="70123", restart=2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[07-09,12]", "node07"),
        ("a,b", "a"),
        ("gpu-3", "gpu-3"),
        ("r1-n[3],r2-n[1-4]", "r1-n3"),
        ("n9,m[1-2]", "n9"),
    ],
)
def test_node_0_is_the_first_of_the_step(nodes: str, first: str) -> None:
    placed = discover(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert isinstance(placed, Nodes)
    assert placed.address == first


def test_several_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(MachineError, match=r"24 tasks on 3 nodes.*--ntasks-per-node=1"):
        discover(SRUN | {"SLURM_NTASKS": "24"})


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_an_environment_with_holes_is_refused_by_the_names_of_the_holes(environment: dict[str, str]) -> None:
    holes = [name for name in environment if name in ("WORLD_SIZE", "MASTER_PORT", "SLURM_NODEID", "SLURM_NTASKS")]
    torn = environment | dict.fromkeys(holes, "x") | {holes[0]: ""}
    with pytest.raises(MachineError) as caught:
        discover(torn)
    for name in holes:
        assert f"{name}={torn[name]}" in str(caught.value)


def test_a_step_without_a_node_list_is_refused() -> None:
    with pytest.raises(MachineError, match="SLURM_STEP_NODELIST is empty: set MASTER_ADDR"):
        discover(SRUN | {"SLURM_STEP_NODELIST": ""})


def test_ranks_are_dealt_to_the_nodes_in_runs_of_equal_length() -> None:
    dealt = [Nodes(index=index, count=3).local_ranks(12) for index in range(3)]
    assert [rank for ranks in dealt for rank in ranks] == list(range(12))
    assert {len(ranks) for ranks in dealt} == {4}


def test_ranks_that_do_not_divide_into_the_nodes_are_refused() -> None:
    with pytest.raises(MachineError, match="8 ranks, 3 nodes were started"):
        Nodes(count=3).local_ranks(8)
