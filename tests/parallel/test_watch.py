"""A slow rank is named, and a healthy one never; what the watch sees of ranks that really hang is in tests/train."""

import random
from pathlib import Path

import pytest

from megagrok.config.schema import WatchConfig
from megagrok.parallel import launch
from megagrok.parallel.beats import PHASES, Beat, Beats
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.watch import Watch, is_waiting_at, phase_limits


def beat(rank: int, steps: int, seconds: float) -> Beat:
    return Beat(rank, "step", steps, steps, 0.0, None, steps, seconds, 0.0)


def named(works: dict[int, float], peers: dict[int, int], *, steps: int, noise: float = 0.0) -> list[str]:
    """What is said over `steps` steps, looked at every fifth, by ranks that work so many seconds in each."""
    said: list[str] = []
    seen = Watch(Beats(0, len(works)), phase_limits(WatchConfig()), peers=peers, say=said.append)
    worked, chance = dict.fromkeys(works, 0.0), random.Random(1)
    for step in range(1, steps + 1):
        for rank, seconds in works.items():
            worked[rank] += seconds * (1 + noise * chance.uniform(-1, 1))
        if step % 5 == 0:
            seen._name_laggards([beat(rank, step, worked[rank]) for rank in works])
    return said


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_a_slow_rank_is_named_once_within_twenty_steps(factor: float) -> None:
    said = named({0: 0.1, 1: 0.1 * factor, 2: 0.1}, {}, steps=20)
    assert len(said) == 1 and said[0].startswith("rank 1 is slow")
    assert len(named({0: 0.1, 1: 0.1 * factor, 2: 0.1}, {}, steps=400)) == 1


def test_a_thousand_healthy_steps_name_nobody() -> None:
    assert named(dict.fromkeys(range(4), 0.05), {}, steps=1000, noise=0.6) == []


def test_ranks_with_other_work_are_not_compared() -> None:
    assert named({0: 0.1, 1: 0.1, 2: 0.3, 3: 0.3}, {0: 0, 1: 0, 2: 1, 3: 1}, steps=100) == []
    assert named({0: 0.1}, {}, steps=100) == []


def test_differences_below_what_sampling_can_tell_name_nobody() -> None:
    assert named({0: 0.001, 1: 0.008}, {}, steps=100) == []


def test_waits_are_told_from_work_by_where_the_code_stands() -> None:
    assert is_waiting_at("/x/torch/distributed/distributed_c10d.py", 1)
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    waiting = next(number for number, line in enumerate(lines, 1) if line.strip() == "request.wait()")
    assert is_waiting_at(__file__, waiting)
    assert not is_waiting_at(__file__, waiting - 2)
    assert not is_waiting_at("<string>", 1)


def waits(request: object) -> None:
    """Never called: its line is what the test above looks at."""
    request.wait()


def makes_a_mistake(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise TypeError("no such thing")
    ranks.barrier()


def loses_a_device(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise RuntimeError("device lost")
    ranks.barrier()


def test_a_mistake_in_the_code_is_no_reason_to_try_again_and_a_lost_device_is() -> None:
    with pytest.raises(launch.RankError, match="rank 1 of 2 failed first.*TypeError: no such thing") as mistake:
        launch.run_ranks(makes_a_mistake, 2, timeout_seconds=20)
    assert mistake.value.exit_code == 70
    with pytest.raises(launch.RankError, match="RuntimeError: device lost") as lost:
        launch.run_ranks(loses_a_device, 2, timeout_seconds=20)
    assert (lost.value.exit_code, lost.value.rank) == (75, 1)


def test_the_limits_are_those_of_the_settings() -> None:
    assert set(phase_limits(WatchConfig())) == set(PHASES)
