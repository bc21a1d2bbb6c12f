"""The arithmetic of the loss ledger: rows add up, waits go to whom they belong, the cost of looking comes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.bench.ledger import ROWS, Arrival, Blocked, Item, Timeline, Work, settle


def timeline(*items: Item, stage: int = 0, start: float = 0.0) -> Timeline:
    return Timeline(stage, start, items)


def meet(name: str, when: float, until: float, row: str = "expert") -> tuple[Item, Item]:
    return Arrival(name, when, row), Blocked(name, when, until - when)


def spent(rows: dict[str, float]) -> dict[str, float]:
    return {row: pytest.approx(seconds) for row, seconds in rows.items() if seconds > 1e-12}


def test_the_time_until_the_last_rank_comes_is_imbalance_and_the_rest_is_transfer() -> None:
    early = timeline(Work("matmul", 1.0), *meet("a", 1.0, 3.5))
    late = timeline(Work("matmul", 3.0), *meet("a", 3.0, 3.5))
    assert settle([early, late]) == [
        {**dict.fromkeys(ROWS, 0.0), **spent({"matmul": 1.0, "imbalance": 2.0, "expert": 0.5})},
        {**dict.fromkeys(ROWS, 0.0), **spent({"matmul": 3.0, "expert": 0.5})},
    ]


def test_waiting_for_a_message_is_bubble() -> None:
    sender = timeline(Work("matmul", 2.0), *meet("m", 2.0, 2.25, "pipeline"))
    receiver = timeline(*meet("m", 0.0, 2.25, "pipeline"), stage=1)
    rows = settle([sender, receiver])
    assert spent(rows[1]) == {"bubble": 2.0, "pipeline": 0.25}


def test_a_collective_of_several_stages_has_imbalance_within_a_stage_and_bubble_beyond_it() -> None:
    rows = settle(
        [
            timeline(Work("matmul", 1.0), *meet("a", 1.0, 5.0, "data"), stage=1),
            timeline(Work("matmul", 2.0), *meet("a", 2.0, 5.0, "data"), stage=1),
            timeline(Work("matmul", 4.0), *meet("a", 4.0, 5.0, "data")),
        ]
    )
    assert spent(rows[0]) == {"matmul": 1.0, "imbalance": 1.0, "bubble": 2.0, "data": 1.0}
    assert spent(rows[1]) == {"matmul": 2.0, "bubble": 2.0, "data": 1.0}


def test_who_leaves_before_the_last_one_comes_has_not_waited_for_it() -> None:
    sender = timeline(*meet("m", 0.0, 0.5, "pipeline"))
    receiver = timeline(Work("matmul", 3.0), *meet("m", 3.0, 3.25, "pipeline"), stage=1)
    rows = settle([sender, receiver])
    assert spent(rows[0]) == {"pipeline": 0.5}


def test_without_the_cost_of_recording_a_wait_follows_from_when_the_peer_would_have_come() -> None:
    early = timeline(Work("matmul", 1.0), *meet("a", 1.0, 4.5))
    late = timeline(Work("matmul", 4.0, events=10), *meet("a", 4.0, 4.5))
    rows = settle([early, late], event_seconds=0.1)
    assert spent(rows[0]) == {"matmul": 1.0, "imbalance": 2.0, "expert": 0.5}
    assert spent(rows[1]) == {"matmul": 3.0, "expert": 0.5}


def test_timelines_that_wait_for_each_other_are_not_settled_silently() -> None:
    one = timeline(Blocked("b", 0.0, 2.0), Arrival("a", 1.0, "expert"))
    other = timeline(Blocked("a", 0.0, 2.0), Arrival("b", 1.0, "expert"))
    with pytest.raises(AssertionError, match="every rank waits for another"):
        settle([one, other])


@st.composite
def recorded(draw: st.DrawFn) -> list[Timeline]:
    """A run of random work and meetings of all ranks, as clocks would have shown it."""
    num_ranks = draw(st.integers(2, 4))
    seconds = st.floats(0, 1)
    clocks = [draw(seconds) for _ in range(num_ranks)]
    starts = list(clocks)
    items: list[list[Item]] = [[] for _ in range(num_ranks)]
    for number in range(draw(st.integers(0, 5))):
        for rank in range(num_ranks):
            work = Work(draw(st.sampled_from(ROWS)), draw(seconds))
            items[rank].append(work)
            clocks[rank] += work.seconds
        together = max(clocks) + draw(seconds)
        for rank in range(num_ranks):
            items[rank] += meet(f"m{number}", clocks[rank], together, draw(st.sampled_from(["expert", "data"])))
            clocks[rank] = together
    stages = [draw(st.integers(0, 1)) for _ in range(num_ranks)]
    return [Timeline(stage, start, tuple(own)) for stage, start, own in zip(stages, starts, items, strict=True)]


@given(recorded())
def test_the_rows_of_every_rank_add_up_to_its_recorded_step(timelines: list[Timeline]) -> None:
    for rows, recorded_step in zip(settle(timelines), timelines, strict=True):
        assert sum(rows.values()) == pytest.approx(recorded_step.seconds, abs=1e-9)
        assert min(rows.values()) >= -1e-9
