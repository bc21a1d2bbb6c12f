"""The ledger of real ranks: a slow-down that is planted shows up in its row, on the rank that pays for it."""

import time
from pathlib import Path

import pytest

from megagrok.bench.ledger import COMMUNICATION, ROWS
from megagrok.bench.measure import Measured, Request, measure
from megagrok.config import RunConfig, decode_config
from megagrok.engine.engine import Engine, Update
from megagrok.model.moe import layer

ROOT = Path(__file__).parents[2]
SMALL = ["model.num_layers=2", "train.global_batch=4", "train.micro_batch=2", "train.seq_len=16"]
LATE_SECONDS, UPDATE_SECONDS = 0.4, 0.5
# What the small step itself takes, with room for a machine that does other things too.
MOST_OF_THE_REST = 0.3


def run_of(*overrides: str) -> RunConfig:
    return decode_config(ROOT / "configs/run/tiny.yaml", [*SMALL, *overrides]).config


def come_late_and_update_slowly(rank: int, engine: Engine) -> None:
    """Rank 0 sleeps before the first exchange of tokens of a step, every rank in its update."""
    exchange, update = layer.dispatch, engine.step
    calls = iter(range(1 << 30))

    def late(*arguments: object) -> object:
        if rank == 0 and next(calls) % 2 == 0:
            time.sleep(LATE_SECONDS)
        return exchange(*arguments)  # type: ignore[arg-type]

    def slow(lr: float) -> Update:
        time.sleep(UPDATE_SECONDS)
        return update(lr)

    vars(layer)["dispatch"] = late
    engine.step = slow  # type: ignore[method-assign]


def others(rows: dict[str, float], *named: str) -> float:
    """The largest of the rows that are not named."""
    return max(rows[row] for row in ROWS if row not in named)


def check_planted(measured: Measured, waits: str) -> None:
    ledger = measured.ledger
    assert ledger is not None
    late, waiting = ledger.by_rank
    # Asleep between two kernels, as far as anyone can see; the peer pays for it in its wait.
    assert late["host"] == pytest.approx(LATE_SECONDS, abs=MOST_OF_THE_REST)
    assert waiting[waits] == pytest.approx(LATE_SECONDS, abs=MOST_OF_THE_REST)
    for rows in ledger.by_rank:
        assert rows["optimizer"] == pytest.approx(UPDATE_SECONDS, abs=MOST_OF_THE_REST)
    assert others(late, "host", "optimizer") < MOST_OF_THE_REST
    assert others(waiting, waits, "optimizer") < MOST_OF_THE_REST
    in_step = sum(seconds for row, seconds in ledger.rows.items() if row != "checkpoint")
    assert in_step == pytest.approx(ledger.total, abs=1e-9)
    assert abs(ledger.difference) < MOST_OF_THE_REST


def check_spoke(measured: Measured, *kinds: str) -> None:
    """Messages travelled over these groups. (The cross-entropy has collectives of one tensor rank, with itself.)"""
    assert measured.ledger is not None
    spoken = {row for row in COMMUNICATION if measured.ledger.rows[row] > 0}
    assert spoken - {"tensor"} == set(kinds)


def test_a_rank_that_comes_late_to_its_experts_is_imbalance_of_the_others_and_a_slow_update_is_optimizer() -> None:
    run = run_of("parallel.data=2", "parallel.expert=2")
    measured = measure(run, Request(steps=1, warmup=1, spoil=come_late_and_update_slowly))
    check_planted(measured, "imbalance")
    check_spoke(measured, "expert", "data")
    assert measured.step_seconds.min > LATE_SECONDS + UPDATE_SECONDS
    assert 0 < measured.mfu(measured.matmul_flops.median) < 1


def test_a_stage_that_is_late_is_bubble_of_the_next() -> None:
    # One layer a stage and two micro-batches: the first stage sleeps before the first.
    run = run_of("parallel.pipeline=2")
    measured = measure(run, Request(steps=1, warmup=1, spoil=come_late_and_update_slowly))
    check_planted(measured, "bubble")
    check_spoke(measured, "pipeline", "data")


@pytest.mark.slow
def test_what_is_computed_again_has_a_row_of_its_own() -> None:
    measured = measure(run_of("train.recompute=full", "parallel.data=2"), Request(steps=1, warmup=1))
    assert measured.ledger is not None
    assert measured.ledger.rows["recompute"] > 0
    assert measured.hardware_flops_per_token > measured.model_flops_per_token


@pytest.mark.slow
def test_balanced_routing_gives_every_expert_the_same_and_real_data_are_read() -> None:
    run = run_of("parallel.data=2", "parallel.expert=2")
    measured = measure(run, Request(steps=1, warmup=1, routing="balanced", data="real"))
    assert measured.loss == pytest.approx(6.2, abs=0.5)
