"""Documents to samples: which tokens make up sample i, for any i, without having made the samples before it.

Not an iterator and without state: a pure function of the documents' lengths, seq_len, the seed and i. The one idea: in
each epoch the documents are shuffled and laid end to end, cut into pieces of seq_len tokens, and the pieces shuffled.

    documents   | d7 ........ | d2 ... | d9 .......... | d0 .. |      order drawn per epoch
    samples     |---- 0 ----|---- 1 ----|---- 2 ----|                 sample k has tokens [k L, k L + L], L + 1 of them

A sample shares its last token with the next one: it is a label there and an input here, so every token but the first is
predicted exactly once an epoch. What does not fill a sample at the end of an epoch is left out, other text each time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagrok.data.prepare import DocumentSet
from megagrok.errors import DataError

_DOCUMENTS, _SAMPLES = 0, 1


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one document, given by its place in the list of lengths."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Sample:
    """seq_len + 1 tokens: inputs are all but the last, labels all but the first."""

    tokens: NDArray[np.int64]
    document_ids: tuple[int, ...]
    """The documents it touches, in order, by their numbers in the token file."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    number: int
    documents: NDArray[np.int64]
    """Order of the documents."""
    ends: NDArray[np.int64]
    """Where each of them ends, when laid end to end, in tokens."""
    samples: NDArray[np.int64]
    """Order of the samples."""


class SampleOrder:
    """Spans of tokens of every sample of every epoch. Equal arguments give equal samples, on any machine."""

    def __init__(self, lengths: NDArray[np.int64], *, seq_len: int, seed: int | None) -> None:
        """lengths: tokens of each document.  seed: None keeps the order of the documents, as for evaluation.

        Raises DataError if the documents do not make up one sample, or the seed is negative.
        """
        if seed is not None and seed < 0:
            raise DataError(f"train.seed = {seed}, needs 0 or more")
        total = int(lengths.sum(dtype=np.int64))
        if total < seq_len + 1:
            raise DataError(
                f"train.seq_len = {seq_len:,}: a sample takes {seq_len + 1:,} tokens, the {len(lengths):,} documents "
                f"have {total:,}. Use more data, or train.seq_len <= {max(total - 1, 1):,}."
            )
        self.seq_len, self.seed = seq_len, seed
        self.samples_per_epoch = (total - 1) // seq_len
        self._lengths = lengths
        self._epoch = self._make_epoch(0)

    def spans(self, sample: int) -> tuple[Span, ...]:
        """The seq_len + 1 tokens of a sample, sample >= 0, as pieces of documents in reading order."""
        assert sample >= 0, sample
        number, position = divmod(sample, self.samples_per_epoch)
        # One epoch is kept: samples are asked for in rising order, so a change of epoch is rare.
        if number != self._epoch.number:
            self._epoch = self._make_epoch(number)
        epoch = self._epoch
        first = int(epoch.samples[position]) * self.seq_len
        stop = first + self.seq_len + 1
        at = int(np.searchsorted(epoch.ends, first, side="right"))
        spans = []
        while first < stop:
            document = int(epoch.documents[at])
            begin = int(epoch.ends[at]) - int(self._lengths[document])
            until = min(stop, int(epoch.ends[at]))
            if until > first:
                spans.append(Span(document, first - begin, until - begin))
            first, at = until, at + 1
        return tuple(spans)

    def _make_epoch(self, number: int) -> _Epoch:
        documents = self._shuffled(len(self._lengths), number, _DOCUMENTS)
        samples = self._shuffled(self.samples_per_epoch, number, _SAMPLES)
        return _Epoch(number, documents, np.cumsum(self._lengths[documents], dtype=np.int64), samples)

    def _shuffled(self, count: int, epoch: int, stream: int) -> NDArray[np.int64]:
        """A permutation of range(count), drawn from a stream that only the seed, the epoch and its name decide."""
        if self.seed is None:
            return np.arange(count, dtype=np.int64)
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(stream, epoch)))
        # numpy promises the bits of a generator for good, but not what Generator.permutation makes of them.
        keys: NDArray[np.uint64] = bits.random_raw(count)
        return np.argsort(keys, kind="stable").astype(np.int64)


class SampleReader:
    """The samples themselves: an order, and the documents it speaks of."""

    def __init__(self, documents: DocumentSet, *, seq_len: int, seed: int | None) -> None:
        """Arguments and errors as for SampleOrder."""
        self.order = SampleOrder(documents.lengths, seq_len=seq_len, seed=seed)
        self._documents = documents

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0, counted through all epochs."""
        tokens = np.empty(self.order.seq_len + 1, dtype=np.int64)
        filled = 0
        touched = []
        for span in self.order.spans(number):
            document = int(self._documents.documents[span.document])
            size = span.stop - span.start
            tokens[filled : filled + size] = self._documents.file.read(document, span.start, span.stop)
            filled += size
            touched.append(document)
        return Sample(tokens, tuple(touched))
