"""What ranks tell each other arrives whole, in order, on all of them; and one rank alone behaves as many do."""

import math
import time

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from megagrok.parallel.ranks import JSON, Alone, ProcessGroupRanks, Ranks

VALUES: list[JSON] = [
    None, True, 0, -(2**70), 0.1, 1e-300, math.inf, "", "Grok ⟨π⟩ \x00", [], {}, [[1], {"a": [None]}], {"": ""},
    "x" * 300_000,
]  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def rotated(ranks: Ranks) -> list[list[JSON]]:
    """Each rank contributes another value in each round, so that lengths differ between ranks."""
    return [ranks.gather(VALUES[(turn + ranks.rank) % len(VALUES)]) for turn in range(len(VALUES))]


def verdicts(ranks: Ranks) -> list[bool]:
    return [ranks.any(ranks.rank == raised) for raised in range(-1, ranks.world_size)]


def waited_seconds(ranks: Ranks) -> float:
    start = time.monotonic()
    if ranks.rank == ranks.world_size - 1:
        time.sleep(0.3)
    ranks.barrier()
    return time.monotonic() - start


def inside_pairs(ranks: Ranks) -> tuple[int, int, list[JSON]]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = ProcessGroupRanks(pairs[ranks.rank // 2])
    return mine.rank, mine.world_size, mine.gather(ranks.rank)


@given(json_values)
def test_alone_gathers_what_json_makes_of_its_value(value: JSON) -> None:
    assert Alone().gather(value) == [value]
    assert Alone().gather((value, value)) == [[value, value]]


def test_alone_is_rank_0_of_1_and_agrees_with_itself() -> None:
    alone: Ranks = Alone()
    alone.barrier()
    assert (alone.rank, alone.world_size, alone.any(True), alone.any(False)) == (0, 1, True, False)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gathers_every_value_in_rank_order(world_size: int) -> None:
    expected = [[VALUES[(turn + rank) % len(VALUES)] for rank in range(world_size)] for turn in range(len(VALUES))]
    assert run_ranks(rotated, world_size) == [expected] * world_size


def test_a_loss_that_is_nan_can_be_told() -> None:
    (gathered,) = run_ranks(gather_nan, 1)
    assert math.isnan(gathered[0])


def gather_nan(ranks: Ranks) -> list[JSON]:
    return ranks.gather(math.nan)


def test_a_flag_raised_on_any_rank_is_seen_by_all() -> None:
    assert run_ranks(verdicts, 3) == [[False, True, True, True]] * 3


def test_nobody_passes_a_barrier_before_the_last_rank_arrives() -> None:
    assert min(run_ranks(waited_seconds, 2)) >= 0.3


def test_a_subgroup_numbers_and_hears_its_own_ranks_only() -> None:
    assert run_ranks(inside_pairs, 4) == [(0, 2, [0, 1]), (1, 2, [0, 1]), (0, 2, [2, 3]), (1, 2, [2, 3])]
