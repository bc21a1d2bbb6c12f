"""Both libraries get the groups of one topology, refuse any other, and no group waits longer than it was told to."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from layouts import make_run
from megatron.core import parallel_state
from ranks import run_ranks

from megagrok.config.schema import ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.errors import TopologyError
from megagrok.parallel.groups import Mpu, ProcessGroups, _prove_agreement, expert_group_name, make_groups
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.topology import Topology
from megagrok.platform import find_platform

LIMIT_SECONDS = 1.0
TOPOLOGIES = [
    Topology(tensor=2, data=2, expert=2),
    Topology(tensor=2, pipeline=2, expert=2),
    Topology(context=2, data=2, expert=4),
]
LARGE_TOPOLOGIES = [
    Topology(tensor=2, data=2, pipeline=2, expert=2),
    Topology(tensor=2, context=2, data=2, expert=4),
    Topology(data=4, pipeline=2, expert=2),
]


@dataclass(frozen=True, slots=True)
class Seen:
    """The groups of one rank as lists of ranks, by who was asked."""

    ours: dict[str, list[int]]
    deepspeed: dict[str, list[int]]
    mpu_places: dict[str, tuple[int, int]]
    embedding: list[int] | None
    is_first_stage: bool
    is_last_stage: bool


def groups_of(topology: Topology, timeout_seconds: float = 30.0) -> ProcessGroups:
    return make_groups(topology, virtual_pipeline=1, platform=find_platform(), timeout_seconds=timeout_seconds)


def look_around(ranks: Ranks, topology: Topology) -> Seen:
    groups = groups_of(topology)
    mpu, members = Mpu(groups), dist.get_process_group_ranks
    name = expert_group_name(topology.expert)
    return Seen(
        ours={
            "tensor": members(groups.tensor),
            "context": members(groups.context),
            "tensor_context": members(groups.tensor_context),
            "data": members(groups.data),
            "pipeline": members(groups.pipeline),
            "model": members(groups.model),
            "expert": members(groups.expert),
            "expert_data": members(groups.expert_data),
        },
        deepspeed={
            "data": members(deepspeed_groups._get_data_parallel_group()),
            "expert": members(deepspeed_groups._get_expert_parallel_group(name)),
            "expert_data": members(deepspeed_groups._get_expert_data_parallel_group(name)),
        },
        mpu_places={
            "data": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
            "model": (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()),
            "tensor": (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
            "pipeline": (mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()),
        },
        embedding=None if groups.embedding is None else members(groups.embedding),
        is_first_stage=groups.is_first_stage,
        is_last_stage=groups.is_last_stage,
    )


@pytest.mark.parametrize(
    "topology", [*TOPOLOGIES, *(pytest.param(large, marks=pytest.mark.slow) for large in LARGE_TOPOLOGIES)], ids=repr
)
def test_every_rank_sees_the_topologys_groups_in_both_libraries(topology: Topology) -> None:
    tables = {
        "tensor": topology.groups("tensor"),
        "context": topology.groups("context"),
        "tensor_context": topology.groups("tensor", "context"),
        "data": topology.groups("data", "context"),
        "pipeline": topology.groups("pipeline"),
        "model": topology.groups("tensor", "pipeline"),
        "expert": topology.expert_groups(),
        "expert_data": topology.expert_data_groups(),
    }
    for rank, seen in enumerate(run_ranks(look_around, topology.world_size, topology=topology)):
        own = {name: next(group for group in table if rank in group) for name, table in tables.items()}
        assert seen.ours == own
        assert seen.deepspeed == {name: own[name] for name in seen.deepspeed}
        assert seen.mpu_places == {name: (own[name].index(rank), len(own[name])) for name in seen.mpu_places}
        stage = topology.coordinates(rank).pipeline
        assert (seen.is_first_stage, seen.is_last_stage) == (stage == 0, stage == topology.pipeline - 1)
        ends = list(dict.fromkeys([own["pipeline"][0], own["pipeline"][-1]]))
        assert seen.embedding == (ends if stage in (0, topology.pipeline - 1) else None)


def test_stages_between_the_ends_have_no_embedding_group() -> None:
    seen = run_ranks(look_around, 3, topology=Topology(pipeline=3))
    assert [at.embedding for at in seen] == [[0, 2], None, [0, 2]]


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(TopologyError, match="the job has 2 ranks, the configuration asks for 4"):
        run_ranks(look_around, 2, topology=Topology(tensor=2, data=2))


def replace_a_group(ranks: Ranks, name: str, stands_in: str) -> str:
    """What is said if a library had made the group `stands_in` where `name` should be."""
    groups = groups_of(Topology(tensor=2, data=2, expert=2))
    try:
        _prove_agreement(replace(groups, **{name: vars(groups)[stands_in]}))
    except TopologyError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "stands_in"),
    [("tensor", "data"), ("data", "tensor"), ("model", "data"), ("expert", "expert_data"), ("context", "tensor")],
)
def test_a_library_that_orders_ranks_differently_is_refused(name: str, stands_in: str) -> None:
    for rank, text in enumerate(run_ranks(replace_a_group, 4, name=name, stands_in=stands_in)):
        assert f"group of rank {rank} is" in text and "the topology says" in text and name in text


def seconds_until_failure(call: Callable[[], object]) -> float:
    started = time.monotonic()
    try:
        call()
    except RuntimeError:
        return time.monotonic() - started
    return float("nan")


def miss_collectives(ranks: Ranks) -> dict[str, float]:
    """Rank 0 alone enters a collective of each group that it shares; how long until each fails."""
    groups = groups_of(Topology(data=2, expert=2), LIMIT_SECONDS)
    name = expert_group_name(2)
    shared = {
        "the world": dist.group.WORLD,
        "Megatron's data": groups.data,
        "Megatron's expert": groups.expert,
        "DeepSpeed's expert": deepspeed_groups._get_expert_parallel_group(name),
        "DeepSpeed's data": deepspeed_groups._get_data_parallel_group(),
    }
    if ranks.rank == 1:
        time.sleep(LIMIT_SECONDS * (len(shared) + 1))
        return {}
    return {
        owner: seconds_until_failure(lambda group=group: dist.all_reduce(torch.ones(1), group=group))
        for owner, group in shared.items()
    }


@pytest.mark.slow
def test_a_collective_that_a_peer_misses_fails_within_the_limit() -> None:
    waited = run_ranks(miss_collectives, 2, timeout_seconds=LIMIT_SECONDS)[0]
    assert len(waited) == 5
    for owner, seconds in waited.items():
        assert seconds < 2 * LIMIT_SECONDS, owner


def timeouts_of_all_groups(ranks: Ranks) -> dict[str, timedelta]:
    """The timeout of every group of this process, once groups and an engine exist."""
    run = make_run(parallel=ParallelConfig(tensor=2, sequence=True, expert=2))
    groups = groups_of(Topology.of(run.parallel), LIMIT_SECONDS)
    build_engine(run, groups, find_platform())
    registered = dist.distributed_c10d._world.pg_names
    return {
        f"{name} {dist.get_process_group_ranks(group)}": group._get_backend(torch.device("cpu")).options._timeout
        for group, name in registered.items()
        if group is not None
    }


def test_no_group_of_either_library_waits_longer_than_the_limit() -> None:
    """New groups wait half an hour unless told otherwise, so this looks at every group that torch knows."""
    for timeouts in run_ranks(timeouts_of_all_groups, 2, timeout_seconds=LIMIT_SECONDS):
        assert len(timeouts) > 8
        too_long = {name: timeout for name, timeout in timeouts.items() if timeout.total_seconds() > LIMIT_SECONDS}
        assert not too_long


def test_megatron_knows_the_virtual_stages() -> None:
    assert run_ranks(virtual_stages, 2) == [2, 2]


def virtual_stages(ranks: Ranks) -> int | None:
    make_groups(Topology(pipeline=2), virtual_pipeline=2, platform=find_platform(), timeout_seconds=30)
    return parallel_state.get_virtual_pipeline_model_parallel_world_size()
