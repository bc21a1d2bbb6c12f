"""The held-out split: decided by content alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.data.split import document_hash, held_out_mask

hash_lists = st.lists(st.integers(0, 2**64 - 1), max_size=30).map(lambda values: np.array(values, dtype=np.uint64))


@settings(max_examples=200, deadline=None)
@given(hashes=hash_lists, copies=st.data(), fraction=st.floats(0, 1))
def test_copies_of_a_document_stand_on_one_side(hashes, copies, fraction):
    if hashes.size:
        hashes = np.concatenate([hashes, hashes[copies.draw(st.lists(st.integers(0, len(hashes) - 1)))]])
    mask = held_out_mask(hashes, fraction)
    assert not set(hashes[mask].tolist()) & set(hashes[~mask].tolist())


@settings(max_examples=200, deadline=None)
@given(hashes=hash_lists, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_share_only_adds(hashes, low, high):
    low, high = sorted((low, high))
    small, large = held_out_mask(hashes, low), held_out_mask(hashes, high)
    assert not (small & ~large).any()


@settings(max_examples=100, deadline=None)
@given(hashes=hash_lists, fraction=st.floats(1e-12, 0.9))
def test_something_is_held_out_and_something_is_trained_on(hashes, fraction):
    mask = held_out_mask(hashes, fraction)
    if len(set(hashes.tolist())) > 1:
        assert mask.any()
    if hashes.size and hashes.min() == hashes.max() and hashes.min() >= fraction * 2.0**64:
        assert not mask.any()


def test_nothing_is_held_out_at_zero():
    assert not held_out_mask(np.array([0, 5], dtype=np.uint64), 0.0).any()


def test_the_share_is_about_the_fraction():
    hashes = np.array([document_hash(str(i).encode()) for i in range(20_000)], dtype=np.uint64)
    for fraction in (0.02, 0.5):
        assert abs(held_out_mask(hashes, fraction).mean() - fraction) < 4 * (fraction / 20_000) ** 0.5


def test_the_hash_never_changes_between_versions():
    assert [document_hash(b""), document_hash(b"abc")] == [8852297771455200831, 17021644177037184533]
