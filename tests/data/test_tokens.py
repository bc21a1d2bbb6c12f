"""Token files: Megatron's bytes both ways, and no damaged file gets past its opening."""

import hashlib
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megagrok.data.tokens import TokenFile, TokenWriter, bin_path, dtype_for_vocab, idx_path
from megagrok.errors import DataError

DOCUMENTS = [[1, 2, 3, 4, 0], [5, 6, 0], [7, 0]]
GOLDEN_INDEX = bytes.fromhex(
    "4d4d494449445800000100000000000000080300000000000000040000000000000005000000030000000200000000000000000000000a00"
    "000000000000100000000000000000000000000000000100000000000000020000000000000003000000 00000000".replace(" ", "")
)
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("dtype", "index_digest", "bin_digest"),
    [("uint16", "471880bac898df99", "4b8a3fc7144c96e8"), ("int32", "57092a4d4fa7480e", "8f7af7eed4748ba0")],
)
def test_the_bytes_of_a_pair_never_change(write_pair, dtype, index_digest, bin_digest):
    prefix = write_pair(DOCUMENTS, dtype=dtype)
    assert digest(idx_path(prefix)) == index_digest
    assert digest(bin_path(prefix)) == bin_digest
    if dtype == "uint16":
        assert idx_path(prefix).read_bytes() == GOLDEN_INDEX


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_what_we_write(write_pair, dtype):
    documents = [*DOCUMENTS, [], [9] * 100]
    theirs = IndexedDataset(str(write_pair(documents, dtype=dtype)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert theirs[0].dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_write_the_bytes_that_megatron_writes_and_read_them(tmp_path, write_pair, dtype):
    theirs = tmp_path / "theirs"
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(idx_path(theirs)))
    ours = write_pair(DOCUMENTS, "ours", dtype)
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    file = TokenFile(theirs)
    assert [file.read(i).tolist() for i in range(file.num_documents)] == DOCUMENTS


def test_a_megatron_document_of_several_sequences_is_one_document(tmp_path):
    prefix = tmp_path / "x"
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.end_document()
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(idx_path(prefix)))
    file = TokenFile(prefix)
    assert file.num_sequences == 3
    assert [file.read(i).tolist() for i in range(file.num_documents)] == [[1, 2, 3, 4, 5], [], [6]]
    assert file.read(0, 1, 4).tolist() == [2, 3, 4]


@pytest.mark.parametrize("vocab_size", [1, 256, 65_499, 65_537, 131_072])
def test_the_dtype_is_the_one_that_megatron_chooses(vocab_size):
    assert dtype_for_vocab(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("vocab_size", [65_500, 65_536])
def test_a_vocabulary_that_megatron_reads_two_ways_is_refused(vocab_size):
    with pytest.raises(DataError, match=r"between 65,500 and 65,536 .* Use at most 65,499 or at least 65,537"):
        dtype_for_vocab(vocab_size)


@st.composite
def typed_documents(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    limits = np.iinfo(dtype)
    token = st.integers(int(limits.min), int(limits.max))
    documents = draw(st.lists(st.lists(token, max_size=20), min_size=1, max_size=12).filter(lambda d: any(d)))
    return dtype, documents


@settings(max_examples=60, deadline=None)
@given(typed_documents())
def test_what_is_written_is_read_back(case):
    dtype, documents = case
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "x"
        with TokenWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add(np.array(document, dtype=dtype))
        file = TokenFile(prefix)
        assert file.dtype == dtype
        assert file.lengths.tolist() == [len(document) for document in documents]
        assert [file.read(i).tolist() for i in range(file.num_documents)] == documents
        theirs = IndexedDataset(str(prefix))
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_change_of_an_index_does_more_than_a_refusal(data):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "x"
        with TokenWriter(prefix, np.dtype("uint16")) as writer:
            for document in DOCUMENTS:
                writer.add(document)
        index = bytearray(idx_path(prefix).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
        del index[data.draw(st.sampled_from([len(index)] * 4 + list(range(len(index))))) :]
        index += bytes(data.draw(st.sampled_from([0, 0, 0, 1, 3, 8])))
        idx_path(prefix).write_bytes(index)
        try:
            file = TokenFile(prefix)
        except DataError as error:
            assert "x." in str(error)
            return
        total = sum(file.read(i).size for i in range(file.num_documents))
        assert total == file.num_tokens


def test_an_interrupted_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "x", np.dtype("uint16")) as writer:
        writer.add([1, 2, 3])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_pair_appears_only_when_it_is_finished(tmp_path):
    with TokenWriter(tmp_path / "x", np.dtype("uint16")) as writer:
        writer.add([1, 2, 3])
        assert not idx_path(tmp_path / "x").exists() and not bin_path(tmp_path / "x").exists()
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_writing_again_replaces_the_pair(write_pair):
    write_pair(DOCUMENTS)
    file = TokenFile(write_pair([[8, 9]], dtype="int32"))
    assert file.read(0).tolist() == [8, 9] and file.num_documents == 1


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 65_536), ("uint16", -1), ("int8", 128), ("uint8", 256)])
def test_a_token_that_the_dtype_cannot_hold_is_refused_and_not_wrapped(tmp_path, dtype, token):
    refused = pytest.raises(DataError, match=rf"token {token:,} of document 1 does not fit {dtype}")
    with refused, TokenWriter(tmp_path / "x", np.dtype(dtype)) as writer:
        writer.add([1])
        writer.add([2, token])
    assert os.listdir(tmp_path) == []


def test_a_pair_without_tokens_is_refused(tmp_path):
    refused = pytest.raises(DataError, match=r"x\.bin: no tokens in 2 documents")
    with refused, TokenWriter(tmp_path / "x", np.dtype("uint16")) as writer:
        writer.add([])
        writer.add([])
    assert os.listdir(tmp_path) == []


def refusal(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        TokenFile(prefix)
    return str(caught.value)


def put(path: Path, offset: int, kind: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, offset, value)
    path.write_bytes(content)


def test_half_a_pair_is_refused(write_pair):
    prefix = write_pair(DOCUMENTS, "a")
    bin_path(prefix).unlink()
    assert "a.idx has no a.bin beside it" in refusal(prefix)
    prefix = write_pair(DOCUMENTS, "b")
    idx_path(prefix).unlink()
    assert "b.bin has no b.idx beside it" in refusal(prefix)


def test_a_missing_pair_is_refused_with_the_prefix_that_works(write_pair, tmp_path):
    prefix = write_pair(DOCUMENTS)
    assert "neither gone.idx nor gone.bin exists" in refusal(tmp_path / "gone")
    assert f"Give the prefix without its ending: {prefix}." in refusal(bin_path(prefix))


def test_a_file_of_another_kind_is_named(write_pair):
    prefix = write_pair(DOCUMENTS)
    idx_path(prefix).write_bytes(b"PK\x03\x04" + bytes(100))
    assert "bytes 0-8 are b'PK" in (message := refusal(prefix)) and "needs MMIDIDX. Is this zip?" in message
    idx_path(prefix).write_bytes(b"")
    assert "x.idx: bytes 0-8 are b'', needs MMIDIDX" in refusal(prefix)
    idx_path(prefix).write_bytes(GOLDEN_INDEX[:20])
    assert "x.idx: 20 bytes, the header alone has 34" in refusal(prefix)


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (9, "<Q", 2, "x.idx: version 2, needs 1"),
        (17, "<B", 6, "x.idx: dtype code 6 (float64), tokens need an integer dtype"),
        (17, "<B", 77, "x.idx: dtype code 77, needs one of 1, 2, 3, 4, 5, 8"),
        (18, "<Q", 0, "x.idx: no sequences"),
        (18, "<Q", 1_203_004, "x.idx: header says 1,203,004 sequences = 14,436,114 bytes, file has 102. Truncated"),
        (18, "<Q", 2**63, "Truncated copy?"),
        (26, "<Q", 3, "x.idx: header says 3 sequences = 94 bytes, file has 102: 8 too many"),
        (34 + 4, "<i", -3, "x.idx: sequence 1 has length -3, needs 0 or more"),
        (34 + 12 + 16, "<q", 4, "x.idx: pointer 2 (4) is before pointer 1 (10)"),
        (34 + 12 + 8, "<q", 12, "x.idx: pointer 1 is 12, needs 10, where the sequence before it ends"),
        (34 + 36, "<q", 1, "x.idx: document index runs from 1 to 3, needs 0 to 3"),
        (34 + 36 + 24, "<q", 2, "x.idx: document index runs from 0 to 2, needs 0 to 3"),
        (34 + 36 + 16, "<q", 0, "x.idx: document 2 starts at sequence 0, before document 1 (1)"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(write_pair, offset, kind, value, message):
    prefix = write_pair(DOCUMENTS)
    put(idx_path(prefix), offset, kind, value)
    assert message in refusal(prefix)


def test_a_truncated_index_is_refused(write_pair):
    prefix = write_pair(DOCUMENTS)
    idx_path(prefix).write_bytes(GOLDEN_INDEX[:60])
    assert "x.idx: header says 3 sequences = 102 bytes, file has 60. Truncated copy?" in refusal(prefix)


def test_multimodal_data_is_refused(write_pair):
    prefix = write_pair(DOCUMENTS)
    idx_path(prefix).write_bytes(GOLDEN_INDEX + bytes(3))
    assert "x.idx: has sequence modes, so it is multimodal data" in refusal(prefix)


def test_tokens_of_another_size_than_the_index_are_refused(write_pair):
    prefix = write_pair(DOCUMENTS)
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content[:-2])
    assert "x.bin: index ends at byte 20, file has 18. Truncated copy?" in refusal(prefix)
    bin_path(prefix).write_bytes(content + b"\0")
    assert "x.bin: index ends at byte 20, file has 21. Index of another file?" in refusal(prefix)
