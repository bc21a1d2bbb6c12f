"""Rank <-> coordinates is one bijection, groups cut the world into parts, and Megatron's own tables say the same."""

from itertools import product

import pytest
from megatron.core.parallel_state import RankGenerator

from megagrok.config.schema import ParallelConfig
from megagrok.errors import TopologyError
from megagrok.parallel.topology import Axis, Coordinates, Topology

AXES: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")
SIZES = [
    Topology(tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert)
    for tensor, context, data, pipeline in product((1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2, 5))
    for expert in (1, 2, 3, 4, 8)
    if (tensor * context * data) % expert == 0
]


def subsets_of_axes() -> list[tuple[Axis, ...]]:
    chosen = product((False, True), repeat=len(AXES))
    return [tuple(axis for axis, take in zip(AXES, takes, strict=True) if take) for takes in chosen]


def is_partition(groups: list[list[int]], world_size: int) -> bool:
    return sorted(rank for group in groups for rank in group) == list(range(world_size))


def test_coordinates_name_each_rank_once_and_follow_the_formula() -> None:
    for topology in SIZES:
        seen = set()
        for rank in range(topology.world_size):
            at = topology.coordinates(rank)
            sizes = topology.tensor, topology.context, topology.data
            assert rank == at.tensor + sizes[0] * (at.context + sizes[1] * (at.data + sizes[2] * at.pipeline))
            assert at.tensor < sizes[0] and at.context < sizes[1] and at.data < sizes[2]
            # The expert axes cut the same stage another way.
            assert rank == at.expert + topology.expert * at.expert_data + topology.stage_size * at.pipeline
            assert at.expert < topology.expert
            seen.add((at.tensor, at.context, at.data, at.pipeline))
        assert len(seen) == topology.world_size


@pytest.mark.parametrize("axes", subsets_of_axes(), ids=lambda axes: "-".join(axes) or "none")
def test_groups_cut_the_world_into_ranks_that_differ_on_these_axes_alone(axes: tuple[Axis, ...]) -> None:
    for topology in SIZES:
        groups = topology.groups(*axes)
        assert is_partition(groups, topology.world_size)
        others = [axis for axis in AXES if axis not in axes]
        for group in groups:
            assert group == sorted(group)
            places = [topology.coordinates(rank) for rank in group]
            fixed = {tuple(_along(place, axis) for axis in others) for place in places}
            moving = {tuple(_along(place, axis) for axis in axes) for place in places}
            assert len(fixed) == 1 and len(moving) == len(group)


def test_an_expert_group_holds_every_expert_once_and_an_expert_data_group_the_same_ones() -> None:
    for topology in SIZES:
        experts, expert_data = topology.expert_groups(), topology.expert_data_groups()
        assert is_partition(experts, topology.world_size) and is_partition(expert_data, topology.world_size)
        for group in experts:
            places = [topology.coordinates(rank) for rank in group]
            assert [place.expert for place in places] == list(range(topology.expert))
            assert len({(place.expert_data, place.pipeline) for place in places}) == 1
        for group in expert_data:
            places = [topology.coordinates(rank) for rank in group]
            assert [place.expert_data for place in places] == list(range(topology.stage_size // topology.expert))
            assert len({(place.expert, place.pipeline) for place in places}) == 1


def test_megatrons_own_tables_say_the_same() -> None:
    words: dict[str, tuple[Axis, ...]] = {
        "tp": ("tensor",),
        "cp": ("context",),
        "dp": ("data",),
        "pp": ("pipeline",),
        "tp-cp": ("tensor", "context"),
        "dp-cp": ("data", "context"),
        "tp-pp": ("tensor", "pipeline"),
    }
    for topology in SIZES:
        order = "tp-cp-ep-dp-pp"
        sizes = {"tp": topology.tensor, "cp": topology.context, "dp": topology.data, "pp": topology.pipeline}
        dense = RankGenerator(ep=1, order=order, **sizes)
        for token, axes in words.items():
            assert sorted(dense.get_ranks(token)) == topology.groups(*axes), (topology, token)
        rest = topology.stage_size // topology.expert
        sparse = RankGenerator(tp=1, cp=1, ep=topology.expert, dp=rest, pp=topology.pipeline, order=order)
        assert sorted(sparse.get_ranks("ep")) == sorted(topology.expert_groups()), topology
        assert sorted(sparse.get_ranks("dp")) == sorted(topology.expert_data_groups()), topology


def test_a_topology_is_what_the_configuration_asks_for() -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, context=3, data=4, pipeline=5, expert=6, virtual_pipeline=2)
    topology = Topology.of(parallel)
    assert topology == Topology(tensor=2, context=3, data=4, pipeline=5, expert=6)
    assert topology.stage_size == 24 and topology.world_size == 120


def test_experts_that_do_not_fill_a_stage_evenly_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"parallel.expert = 4, needs a divisor of .* = 6"):
        Topology(tensor=2, data=3, expert=4)


@pytest.mark.parametrize("rank", [-1, 8, 1000])
def test_a_rank_outside_the_world_has_no_place(rank: int) -> None:
    with pytest.raises(TopologyError, match=rf"rank {rank} is outside 0 \.\. 7"):
        Topology(tensor=2, data=2, pipeline=2).coordinates(rank)


def _along(place: Coordinates, axis: Axis) -> int:
    return {
        "tensor": place.tensor,
        "context": place.context,
        "data": place.data,
        "pipeline": place.pipeline,
    }[axis]
