"""Laws of records: one line of JSON and back, whatever the numbers are."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.errors import DataError
from megagrok.telemetry.expert_load import expert_shares, imbalance
from megagrok.telemetry.records import EvaluationRecord, Record, StepRecord, make_evaluation, parse_record

numbers = st.floats()
counts = st.integers(0, 10**15)
shares = st.lists(st.lists(numbers, min_size=1, max_size=4).map(tuple), max_size=3).map(tuple)
step_records = st.builds(
    StepRecord,
    step=counts,
    loss=numbers,
    balance_loss=numbers,
    z_loss=numbers,
    grad_norm=numbers,
    clip_coefficient=numbers,
    lr=numbers,
    tokens=counts,
    consumed_samples=counts,
    global_batch=counts,
    step_seconds=numbers,
    tokens_per_second=numbers,
    mfu=st.none() | numbers,
    expert_load=shares,
)
evaluation_records = st.builds(EvaluationRecord, step=counts, loss=numbers, perplexity=numbers, tokens=counts)
STEP_KEYS = [
    "kind",
    "step",
    "loss",
    "balance_loss",
    "z_loss",
    "grad_norm",
    "clip_coefficient",
    "lr",
    "tokens",
    "consumed_samples",
    "global_batch",
    "step_seconds",
    "tokens_per_second",
    "mfu",
    "expert_load",
]


@given(step_records | evaluation_records)
def test_a_record_survives_its_line(record: Record) -> None:
    line = json.dumps(record.to_json(), allow_nan=False)
    # repr, because nan is not equal to itself.
    assert repr(parse_record(json.loads(line), place="here")) == repr(record)


@given(step_records, evaluation_records)
def test_a_line_has_the_published_keys_in_their_order(step: StepRecord, evaluation: EvaluationRecord) -> None:
    assert list(step.to_json()) == STEP_KEYS
    assert list(evaluation.to_json()) == ["kind", "step", "loss", "perplexity", "tokens"]


@given(step_records, st.sampled_from(STEP_KEYS))
def test_a_line_without_a_key_is_refused_by_name(record: StepRecord, key: str) -> None:
    line = record.to_json()
    del line[key]
    with pytest.raises(DataError, match=f"metrics.jsonl:7: no key '{key}'"):
        parse_record(line, place="metrics.jsonl:7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "note"}, "kind is 'note'"),
        ({"loss": "high"}, "not of its type"),
        ({"expert_load": 3}, "not of its type"),
    ],
)
def test_a_line_of_another_kind_is_refused(change: dict[str, object], message: str) -> None:
    line = STEP.to_json() | change
    with pytest.raises(DataError, match=message):
        parse_record(line, place="x")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_perplexity_is_the_exponential_of_the_loss_and_never_an_error(loss: float) -> None:
    record = make_evaluation(step=1, loss=loss, tokens=1)
    assert record.perplexity == (math.exp(loss) if loss < 709 else pytest.approx(record.perplexity))
    assert loss < 709.8 or record.perplexity == math.inf


@given(st.integers(1, 6).flatmap(lambda e: st.lists(st.lists(counts, min_size=e, max_size=e), max_size=4)))
def test_shares_of_a_layer_sum_to_one_and_imbalance_lies_between_even_and_one_expert(
    counts_LE: list[list[int]],
) -> None:
    shares_LE = expert_shares(counts_LE)
    for counts_E, shares_E, factor in zip(counts_LE, shares_LE, imbalance(shares_LE), strict=True):
        if sum(counts_E) == 0:
            assert set(shares_E) == {0.0}
            assert factor == 0.0
        else:
            assert sum(shares_E) == pytest.approx(1.0, abs=1e-6 * len(shares_E))
            assert 1.0 - 1e-9 <= factor <= len(shares_E) + 1e-9


def test_imbalance_of_known_loads() -> None:
    assert imbalance(expert_shares([[5, 5, 5, 5], [0, 20, 0, 0], [10, 5, 5, 0]])) == pytest.approx((1.0, 4.0, 2.0))


STEP = StepRecord(
    step=1,
    loss=5.0,
    balance_loss=1.0,
    z_loss=0.1,
    grad_norm=1.0,
    clip_coefficient=1.0,
    lr=1e-3,
    tokens=64,
    consumed_samples=8,
    global_batch=8,
    step_seconds=0.5,
    tokens_per_second=128.0,
    mfu=0.25,
    expert_load=((0.5, 0.5),),
)
