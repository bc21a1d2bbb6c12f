"""Batches: every sample once, in an order that neither layout nor interruption changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.data.batches import Batch, TrainBatches, held_out_batches
from megagrok.data.prepare import PreparedData
from megagrok.errors import DataError
from megagrok.model.loss import IGNORED_LABEL

SEQ_LEN = 7


@pytest.fixture
def prepared(prepare_tokens) -> PreparedData:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100, size=rng.integers(1, 40)).tolist() for _ in range(60)]
    return prepare_tokens(documents, 0.3)


def batches(prepared: PreparedData, *, data_rank=0, data_size=1, micro_batch=2, seed=5) -> TrainBatches:
    return TrainBatches(
        prepared,
        seq_len=SEQ_LEN,
        seed=seed,
        micro_batch=micro_batch,
        data_rank=data_rank,
        data_size=data_size,
    )


def micro_batches(parts: list[Batch]) -> list[tuple[int, ...]]:
    """Sample ids of the micro-batches of all data ranks in the global order: micro-batch first, then rank."""
    width = parts[0].tokens_MBS.shape[1]
    count = parts[0].tokens_MBS.shape[0]
    return [part.sample_ids[m * width : (m + 1) * width] for m in range(count) for part in parts]


def run(prepared: PreparedData, sizes: list[int], data_size: int) -> list[list[tuple[int, ...]]]:
    ranks = [batches(prepared, data_rank=r, data_size=data_size) for r in range(data_size)]
    return [micro_batches([rank.next_batch(size) for rank in ranks]) for size in sizes]


def test_every_sample_comes_once_an_epoch_in_every_layout(prepared):
    n = batches(prepared).samples_per_epoch
    steps = -(-3 * n // 8)
    for data_size in (1, 2, 4):
        seen = [i for step in run(prepared, [8] * steps, data_size) for micro in step for i in micro]
        assert seen == list(range(8 * steps))


def test_micro_batches_do_not_depend_on_the_number_of_data_ranks(prepared):
    sizes = [8, 8, 16, 24, 8]
    assert run(prepared, sizes, 1) == run(prepared, sizes, 2) == run(prepared, sizes, 4)


def test_the_tokens_of_a_sample_do_not_depend_on_the_layout(prepared):
    def texts(data_size: int, micro_batch: int, global_batch: int) -> dict[int, tuple[list[int], tuple[int, ...]]]:
        found = {}
        for r in range(data_size):
            source = batches(prepared, data_rank=r, data_size=data_size, micro_batch=micro_batch)
            for _ in range(48 // global_batch):
                batch = source.next_batch(global_batch)
                rows = zip(batch.sample_ids, batch.tokens_MBS.flatten(0, 1).tolist(), batch.document_ids, strict=True)
                found |= {i: (row, documents) for i, row, documents in rows}
        return found

    assert texts(1, 1, 48) == texts(2, 2, 8) == texts(4, 3, 12) == texts(3, 1, 6)


def test_labels_are_the_tokens_that_follow(prepared):
    batch = batches(prepared, data_rank=1, data_size=2).next_batch(12)
    assert batch.tokens_MBS.shape == batch.labels_MBS.shape == (3, 2, SEQ_LEN)
    assert batch.tokens_MBS.dtype == batch.labels_MBS.dtype == torch.int64
    assert torch.equal(batch.tokens_MBS[..., 1:], batch.labels_MBS[..., :-1])
    assert batch.num_tokens == 6 * SEQ_LEN


def test_labels_that_do_not_count_are_not_counted(prepared):
    batch = batches(prepared).next_batch(4)
    batch.labels_MBS[0, 0, :3] = IGNORED_LABEL
    assert batch.num_tokens == 4 * SEQ_LEN - 3


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, 2, 4])), max_size=5))
def test_stopping_and_going_on_with_other_ranks_changes_nothing(prepared_once, stops):
    whole = [step for steps in run(prepared_once, [8] * 40, 1) for step in [steps]]
    state = batches(prepared_once).state_dict()
    done = []
    for steps, data_size in [*stops, (3, 2)]:
        ranks = [batches(prepared_once, data_rank=r, data_size=data_size) for r in range(data_size)]
        for rank in ranks:
            rank.load_state(state)
        done += [micro_batches([rank.next_batch(8) for rank in ranks]) for _ in range(steps)]
        assert len({str(rank.state_dict()) for rank in ranks}) == 1
        state = ranks[-1].state_dict()
    assert done == whole[: len(done)]


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory) -> PreparedData:
    from megagrok.config.schema import DataConfig
    from megagrok.data.prepare import prepare
    from megagrok.data.tokens import TokenWriter

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    with TokenWriter(folder / "x", np.dtype("uint16")) as writer:
        for _ in range(40):
            writer.add(rng.integers(0, 100, size=rng.integers(1, 40)))
    return prepare(DataConfig(cache=str(folder / "cache"), tokens=str(folder / "x")), model_vocab_size=100)


def test_training_and_held_out_batches_share_no_document(prepared):
    source = batches(prepared)
    trained = {d for _ in range(source.samples_per_epoch) for ids in source.next_batch(2).document_ids for d in ids}
    held_out = {
        d
        for batch in held_out_batches(
            prepared, seq_len=3, num_samples=20, global_batch=4, micro_batch=2, data_rank=0, data_size=1
        )
        for ids in batch.document_ids
        for d in ids
    }
    assert trained and held_out and not trained & held_out


def test_an_evaluation_reads_the_same_samples_whatever_the_layout(prepared):
    def ids(data_size: int, global_batch: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for r in range(data_size):
            for batch in held_out_batches(
                prepared,
                seq_len=3,
                num_samples=24,
                global_batch=global_batch,
                micro_batch=2,
                data_rank=r,
                data_size=data_size,
            ):
                found |= dict(zip(batch.sample_ids, batch.tokens_MBS.flatten(0, 1).tolist(), strict=True))
        assert sorted(found) == list(range(24))
        return [found[i] for i in range(24)]

    assert ids(1, 4) == ids(2, 16) == ids(4, 8) == ids(1, 24)


def test_an_evaluation_larger_than_the_held_out_data_is_refused_before_it_starts(prepared):
    with pytest.raises(DataError, match=r"evaluate_samples = 5,000: the \d+ held-out documents make \d+ samples of 7"):
        held_out_batches(prepared, seq_len=7, num_samples=5000, global_batch=8, micro_batch=2, data_rank=0, data_size=1)


@pytest.mark.parametrize(("global_batch", "nearest"), [(10, "8, 16"), (3, "8"), (0, "8")])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(prepared, global_batch, nearest):
    source = batches(prepared, data_size=4)
    with pytest.raises(DataError, match=rf"of {global_batch} samples, needs a multiple .* = 8\. Nearest: {nearest}\."):
        source.next_batch(global_batch)
    assert source.consumed_samples == 0


def test_a_position_in_other_data_is_refused_with_every_difference(prepared, prepared_once):
    source = batches(prepared)
    source.next_batch(4)
    state = source.state_dict()
    assert state["consumed_samples"] == 4
    with pytest.raises(DataError, match=r"fingerprint: saved \w{32}, now \w{32}; seed: saved 5, now 6"):
        batches(prepared_once, seed=6).load_state(state)
    with pytest.raises(DataError, match=r"seq_len: saved None, now 7"):
        source.load_state({key: value for key, value in state.items() if key != "seq_len"})
    with pytest.raises(DataError, match=r"consumed_samples = -1"):
        source.load_state({**state, "consumed_samples": -1})
    assert source.consumed_samples == 4
