"""Counting a run in closed form and step by step gives the same numbers."""

import dataclasses
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megagrok.config import BatchStage, load_config
from megagrok.plan import global_batch_at, total_samples

TRAIN = load_config(Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml").config.train


@given(steps=st.integers(1, 60), stages=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), max_size=4))
def test_a_run_consumes_what_its_steps_consume(steps: int, stages: list[tuple[int, int]]) -> None:
    until, batch, ramp = 0, 0, []
    for more_samples, more_batch in stages:
        until, batch = until + more_samples, batch + more_batch
        ramp.append(BatchStage(until_samples=until, global_batch=batch))
    train = dataclasses.replace(TRAIN, steps=steps, batch_ramp=tuple(ramp), global_batch=batch + 1)
    consumed = 0
    for _ in range(steps):
        consumed += global_batch_at(train, consumed)
    assert total_samples(train) == consumed


def test_a_stage_ends_at_its_last_sample() -> None:
    train = dataclasses.replace(TRAIN, batch_ramp=(BatchStage(until_samples=8, global_batch=4),), global_batch=16)
    assert [global_batch_at(train, consumed) for consumed in (0, 7, 8, 9)] == [4, 4, 16, 16]
