"""The order of samples: each token once an epoch, and nothing but lengths, seed, seq_len and i decides it."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.data.samples import SampleOrder, SampleReader
from megagrok.errors import DataError

lengths_and_seq_len = st.tuples(
    st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 3)
).filter(lambda case: sum(case[0]) > case[1])


def labels_of(order: SampleOrder, sample: int) -> list[tuple[int, int]]:
    """(document, offset) of each token of a sample but the first."""
    return [(span.document, at) for span in order.spans(sample) for at in range(span.start, span.stop)][1:]


@settings(max_examples=150, deadline=None)
@given(case=lengths_and_seq_len, seed=st.integers(0, 2**40))
def test_every_token_is_a_label_at_most_once_an_epoch_and_few_are_left_out(case, seed):
    lengths, seq_len, epoch = case
    order = SampleOrder(np.array(lengths), seq_len=seq_len, seed=seed)
    n = order.samples_per_epoch
    labels = [label for i in range(epoch * n, (epoch + 1) * n) for label in labels_of(order, i)]
    assert len(labels) == len(set(labels)) == n * seq_len
    assert sum(lengths) - len(labels) - 1 < seq_len


@settings(max_examples=150, deadline=None)
@given(case=lengths_and_seq_len)
def test_unshuffled_samples_follow_each_other_with_one_token_overlap(case):
    lengths, seq_len, _ = case
    stream = [(d, at) for d, length in enumerate(lengths) for at in range(length)]
    order = SampleOrder(np.array(lengths), seq_len=seq_len, seed=None)
    for i in range(order.samples_per_epoch):
        got = [(span.document, at) for span in order.spans(i) for at in range(span.start, span.stop)]
        assert got == stream[i * seq_len : i * seq_len + seq_len + 1]


@settings(max_examples=50, deadline=None)
@given(case=lengths_and_seq_len, queries=st.lists(st.integers(0, 100), min_size=1, max_size=10))
def test_a_sample_does_not_depend_on_what_was_asked_before(case, queries):
    lengths, seq_len, seed = case
    order = SampleOrder(np.array(lengths), seq_len=seq_len, seed=seed)
    for i in queries:
        assert order.spans(i) == SampleOrder(np.array(lengths), seq_len=seq_len, seed=seed).spans(i)


def test_epochs_and_seeds_differ():
    lengths = np.arange(1, 40)
    n = SampleOrder(lengths, seq_len=5, seed=0).samples_per_epoch
    orders = [
        tuple(SampleOrder(lengths, seq_len=5, seed=seed).spans(epoch * n + i) for i in range(n))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_the_order_never_changes_between_versions():
    order = SampleOrder(np.arange(1, 200), seq_len=16, seed=1234)
    text = "\n".join(str([(s.document, s.start, s.stop) for s in order.spans(i)]) for i in range(0, 4000, 3))
    assert order.samples_per_epoch == 1243
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1511b31dd827f656"


def test_a_sample_has_the_tokens_and_names_the_documents(prepare_tokens):
    documents = [[10 * d + k for k in range(3 + d)] for d in range(6)]
    prepared = prepare_tokens(documents)
    reader = SampleReader(prepared.train(), seq_len=4, seed=3)
    for i in range(3 * reader.order.samples_per_epoch):
        sample = reader.sample(i)
        assert sample.tokens.dtype == np.int64 and sample.tokens.shape == (5,)
        assert list(dict.fromkeys(int(t) // 10 for t in sample.tokens)) == list(sample.document_ids)


def test_empty_documents_belong_to_no_sample(prepare_tokens):
    reader = SampleReader(prepare_tokens([[], [1, 2], [], [3, 4], []]).train(), seq_len=3, seed=None)
    assert reader.sample(0).tokens.tolist() == [1, 2, 3, 4]
    assert reader.sample(0).document_ids == (1, 3)


def test_data_shorter_than_one_sample_is_refused():
    SampleOrder(np.array([3, 2]), seq_len=4, seed=0)
    with pytest.raises(
        DataError, match=r"seq_len = 5: a sample takes 6 tokens, the 2 documents have 5\. .*seq_len <= 4"
    ):
        SampleOrder(np.array([3, 2]), seq_len=5, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(DataError, match=r"train\.seed = -1, needs 0 or more"):
        SampleOrder(np.array([30]), seq_len=4, seed=-1)
