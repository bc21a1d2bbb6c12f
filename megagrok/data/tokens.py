"""Token files: Megatron's `.bin`/`.idx` pair, read by memory map and written atomically, byte for byte Megatron's.

Not a dataset: which documents are trained on, and in which order, is decided in `samples.py`. The one idea: an index
is checked completely when it is opened (sizes, pointers, boundaries), so that no later read can leave the file.

    .idx   magic 9 | version u64 = 1 | dtype u8 | S u64 | K u64 | lengths i32[S] | pointers i64[S] | documents i64[K]
    .bin   the tokens of all sequences, back to back, little-endian, without a header

K is the number of documents plus one: entry d is the first sequence of document d, the last entry is S.
Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.1.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megagrok.data.magic import kind_of_bytes
from megagrok.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_FLOAT_CODES = {6: "float64", 7: "float32"}


def bin_path(prefix: Path) -> Path:
    """The token file of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a pair."""
    return Path(f"{prefix}.idx")


def dtype_for_vocab(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores tokens of this vocabulary in: uint16 below 65500, int32 above 65536.

    Between them Megatron's writer uses int32 while its fast reader assumes uint16 and misreads in silence, so a
    vocabulary of 65500 to 65536 is refused with DataError.
    """
    if vocab_size < 65500:
        return np.dtype("<u2")
    if vocab_size > 65536:
        return np.dtype("<i4")
    raise DataError(
        f"vocabulary of {vocab_size:,} tokens: between 65,500 and 65,536 Megatron's writer stores int32 and its fast "
        "reader reads uint16. Use at most 65,499 or at least 65,537 tokens."
    )


class TokenFile:
    """A `.bin`/`.idx` pair, checked and memory-mapped. Documents count from 0.

    Raises DataError if a file is missing, damaged, of another kind, or the two do not belong together. Safe to open
    on every rank; nothing but the index is read until tokens are asked for.
    """

    def __init__(self, prefix: Path) -> None:
        """prefix: path of the pair without `.bin` or `.idx`."""
        self.prefix = prefix
        _check_pair_exists(prefix)
        self.dtype, lengths, pointers, boundaries = _read_index(idx_path(prefix))
        _check_sequences(idx_path(prefix), lengths, pointers, self.dtype.itemsize)
        self.num_sequences = len(lengths)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        _check_bin_size(prefix, self.num_tokens * self.dtype.itemsize)
        starts = np.append(pointers // self.dtype.itemsize, self.num_tokens)
        self._document_starts: NDArray[np.int64] = starts[boundaries]
        self.lengths: NDArray[np.int64] = np.diff(self._document_starts)
        """Tokens of each document, int64 [documents]."""
        self._tokens: NDArray[Any] = np.memmap(bin_path(prefix), dtype=self.dtype, mode="r")

    @property
    def num_documents(self) -> int:
        """Documents in the pair, empty ones included."""
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a document, in the file's dtype; a view of the map, not a copy."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        assert document >= 0 and 0 <= start <= stop <= length, (document, start, stop, length)
        first = int(self._document_starts[document])
        return self._tokens[first + start : first + stop]


class TokenWriter:
    """Writes a pair; both files appear under their names only after the last document, `.bin` first.

    Use as a context manager: leaving it normally finishes the pair, an exception removes what was written.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """dtype: an integer dtype that the format knows; `dtype_for_vocab` gives Megatron's choice."""
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        assert self.dtype in _CODE_OF_DTYPE, f"{dtype} is not a dtype of the format"
        self._lengths: list[int] = []
        self._bin_tmp = Path(f"{bin_path(prefix)}.{os.getpid()}.tmp")
        self._idx_tmp = Path(f"{idx_path(prefix)}.{os.getpid()}.tmp")
        self._file = self._bin_tmp.open("wb")

    def add(self, tokens: NDArray[np.integer[Any]] | list[int]) -> None:
        """Append one document. Raises DataError if a token does not fit the dtype or the document 2^31 - 1 tokens."""
        values = np.asarray(tokens, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            worst = int(values.max()) if values.max() > limits.max else int(values.min())
            raise DataError(
                f"{bin_path(self.prefix)}: token {worst:,} of document {len(self._lengths):,} does not fit "
                f"{self.dtype.name}, which holds ids {limits.min:,} to {limits.max:,}. Choose the dtype by the "
                "tokenizer's vocabulary."
            )
        if values.size > np.iinfo(np.int32).max:
            raise DataError(
                f"{bin_path(self.prefix)}: document {len(self._lengths):,} has {values.size:,} tokens, the format "
                "allows 2,147,483,647. Split the document."
            )
        self._file.write(values.astype(self.dtype).tobytes())
        self._lengths.append(values.size)

    def finish(self) -> None:
        """Write the index and move both files into place. Raises DataError if there is not one token."""
        lengths = np.asarray(self._lengths, dtype="<i4")
        if int(lengths.sum(dtype=np.int64)) == 0:
            raise DataError(
                f"{bin_path(self.prefix)}: no tokens in {len(lengths):,} documents; readers need at least one"
            )
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate([[0], ends[:-1]]).astype("<i8")
        with self._idx_tmp.open("wb") as index:
            index.write(_HEADER.pack(MAGIC, 1, _CODE_OF_DTYPE[self.dtype], len(lengths), len(lengths) + 1))
            index.write(lengths.tobytes())
            index.write(pointers.tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _sync(index.fileno())
        self._file.flush()
        _sync(self._file.fileno())
        self._file.close()
        # An index of an earlier pair must never stand beside the new tokens, not even for a moment.
        idx_path(self.prefix).unlink(missing_ok=True)
        self._bin_tmp.replace(bin_path(self.prefix))
        self._idx_tmp.replace(idx_path(self.prefix))
        sync_folder(self.prefix.parent)

    def discard(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        self._bin_tmp.unlink(missing_ok=True)
        self._idx_tmp.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _check_pair_exists(prefix: Path) -> None:
    index, tokens = idx_path(prefix), bin_path(prefix)
    if index.is_file() and tokens.is_file():
        return
    if index.exists() or tokens.exists():
        there, missing = (index, tokens) if index.exists() else (tokens, index)
        raise DataError(f"{there} has no {missing.name} beside it. A token file is a pair of .bin and .idx.")
    hint = ""
    if prefix.suffix in (".bin", ".idx"):
        hint = f" Give the prefix without its ending: {prefix.with_suffix('')}."
    raise DataError(f"{prefix}: neither {index.name} nor {tokens.name} exists in {prefix.parent}.{hint}")


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """dtype, lengths [S], pointers [S] and document boundaries [K] of an index whose size agrees with its header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    dtype, num_sequences, num_boundaries = _check_header(path, head)
    needed = HEADER_BYTES + 12 * num_sequences + 8 * num_boundaries
    if size < needed:
        raise DataError(
            f"{path}: header says {num_sequences:,} sequences = {needed:,} bytes, file has {size:,}. Truncated copy?"
        )
    if size == needed + num_sequences:
        raise DataError(f"{path}: has sequence modes, so it is multimodal data; only text tokens are read")
    if size > needed:
        raise DataError(
            f"{path}: header says {num_sequences:,} sequences = {needed:,} bytes, file has {size:,}: "
            f"{size - needed:,} too many. Not written by Megatron, or damaged."
        )
    raw: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER_BYTES)
    pointers = np.frombuffer(raw, "<i8", num_sequences, HEADER_BYTES + 4 * num_sequences)
    boundaries = np.frombuffer(raw, "<i8", num_boundaries, HEADER_BYTES + 12 * num_sequences)
    _check_boundaries(path, boundaries, num_sequences)
    return dtype, lengths, pointers, boundaries


def _check_header(path: Path, head: bytes) -> tuple[np.dtype[Any], int, int]:
    """dtype, number of sequences S, number of document boundaries K."""
    if head[: len(MAGIC)] != MAGIC:
        kind = kind_of_bytes(head)
        question = f" Is this {kind}?" if kind else ""
        raise DataError(f"{path}: bytes 0-8 are {head[:9]!r}, needs MMIDIDX.{question}")
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: {len(head)} bytes, the header alone has {HEADER_BYTES}. Truncated copy?")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path}: version {version}, needs 1")
    if code in _FLOAT_CODES:
        raise DataError(f"{path}: dtype code {code} ({_FLOAT_CODES[code]}), tokens need an integer dtype")
    if code not in _DTYPE_OF_CODE:
        raise DataError(f"{path}: dtype code {code}, needs one of {', '.join(map(str, _DTYPE_OF_CODE))}")
    if num_sequences == 0:
        raise DataError(f"{path}: no sequences")
    return _DTYPE_OF_CODE[code], num_sequences, num_boundaries


def _check_boundaries(path: Path, boundaries: NDArray[np.int64], num_sequences: int) -> None:
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != num_sequences:
        ends = f"{boundaries[0]:,} to {boundaries[-1]:,}" if len(boundaries) else "nothing"
        raise DataError(f"{path}: document index runs from {ends}, needs 0 to {num_sequences:,} (the sequences)")
    falls = np.flatnonzero(boundaries[1:] < boundaries[:-1])
    if falls.size:
        at = int(falls[0]) + 1
        raise DataError(
            f"{path}: document {at:,} starts at sequence {boundaries[at]:,}, before document {at - 1:,} "
            f"({boundaries[at - 1]:,})"
        )


def _check_sequences(path: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int) -> None:
    """Every sequence begins where the one before it ends, as every Megatron writer has it."""
    if (lengths < 0).any():
        at = int(np.flatnonzero(lengths < 0)[0])
        raise DataError(f"{path}: sequence {at:,} has length {lengths[at]:,}, needs 0 or more")
    expected = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * itemsize])
    wrong = np.flatnonzero(pointers != expected)
    if wrong.size == 0:
        return
    at = int(wrong[0])
    if at and pointers[at] < pointers[at - 1]:
        raise DataError(f"{path}: pointer {at} ({pointers[at]}) is before pointer {at - 1} ({pointers[at - 1]})")
    raise DataError(f"{path}: pointer {at} is {pointers[at]}, needs {expected[at]}, where the sequence before it ends")


def _check_bin_size(prefix: Path, indexed_bytes: int) -> None:
    path, size = bin_path(prefix), bin_path(prefix).stat().st_size
    if size < indexed_bytes:
        raise DataError(f"{path}: index ends at byte {indexed_bytes:,}, file has {size:,}. Truncated copy?")
    if size > indexed_bytes:
        raise DataError(f"{path}: index ends at byte {indexed_bytes:,}, file has {size:,}. Index of another file?")
    if indexed_bytes == 0:
        raise DataError(f"{path}: no tokens")
