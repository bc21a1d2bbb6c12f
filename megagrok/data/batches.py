"""Samples to batches: this data rank's part of a global batch, and the one integer that is the position.

Not a loader with workers: a batch is a few memory-mapped reads. The one idea: which sample goes where is arithmetic, so
a run that was stopped, or goes on with another number of ranks, trains on the same samples in the same steps.

Sample j of a step goes to micro-batch j // (micro_batch * data_size) of data rank (j // micro_batch) % data_size:

    j           0 1 | 2 3 | 4 5 | 6 7 | 8 9 |10 11        micro_batch = 2
    data_size 2  r0   r1    r0    r1    r0    r1          micro-batches 0, 0, 1, 1, 2, 2
    data_size 1  r0   r0    r0    r0    r0    r0          micro-batches 0, 1, 2, 3, 4, 5

So the sets of micro_batch samples that go through the model together do not depend on data_size.

Samples that a guard has left out (a rewind) are passed over when they come up; those after them move forward.

Shape letters: M micro-batches of this rank, B samples of a micro-batch, S tokens of a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagrok.config.schema import RunConfig
from megagrok.data.prepare import PreparedData
from megagrok.data.samples import SampleReader
from megagrok.errors import DataError
from megagrok.model.loss import IGNORED_LABEL
from megagrok.parallel.ranks import JSON


@dataclass(frozen=True, slots=True)
class Batch:
    """One data rank's part of a global batch; the same on all tensor, context and pipeline ranks of that data rank."""

    tokens_MBS: Tensor
    """Inputs, int64, on the CPU."""
    labels_MBS: Tensor
    """The token that follows each input, int64; IGNORED_LABEL where it does not count."""
    sample_ids: tuple[int, ...]
    """Sample numbers, counted through all epochs, in the order of [M, B]."""
    document_ids: tuple[tuple[int, ...], ...]
    """For each sample the documents it touches, by their numbers in the token file."""

    @property
    def num_tokens(self) -> int:
        """Labels of this rank's part that count towards the loss."""
        return int((self.labels_MBS != IGNORED_LABEL).sum())


class TrainBatches:
    """Batches for one data rank, and `consumed_samples`: the position of the whole run, equal on all ranks."""

    def __init__(
        self, prepared: PreparedData, *, seq_len: int, seed: int, micro_batch: int, data_rank: int, data_size: int
    ) -> None:
        """Every rank makes its own; nothing is exchanged. Raises DataError if the data makes up no sample."""
        assert 0 <= data_rank < data_size and micro_batch > 0
        self.consumed_samples = 0
        """Position behind the last sample of the steps so far, those left out among them counted."""
        self.left_out: tuple[tuple[int, int], ...] = ()
        """Samples [from, to) that are passed over when they come up; equal on all ranks."""
        self._reader = SampleReader(prepared.train(), seq_len=seq_len, seed=seed)
        self._prepared, self._seq_len, self._seed = prepared, seq_len, seed
        self._changes: list[JSON] = []
        self._micro_batch, self._data_rank, self._data_size = micro_batch, data_rank, data_size

    @classmethod
    def of(cls, run: RunConfig, prepared: PreparedData, data_rank: int) -> "TrainBatches":
        """The batches of one data rank of a run."""
        train = run.train
        return cls(
            prepared,
            seq_len=train.seq_len,
            seed=train.seed,
            micro_batch=train.micro_batch,
            data_rank=data_rank,
            data_size=run.parallel.data,
        )

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the data repeats, in another order."""
        return self._reader.order.samples_per_epoch

    @property
    def fingerprint(self) -> str:
        """Of the data; see PreparedData."""
        return self._prepared.fingerprint

    @property
    def next_sample(self) -> int:
        """The first sample of the next step."""
        return self._pass_over(self.consumed_samples)

    def next_batch(self, global_batch: int) -> Batch:
        """This rank's part of the next global_batch samples. Called by every rank with the same number.

        Raises DataError unless global_batch is a multiple of micro_batch * data_size.
        """
        samples: list[int] = []
        at = self.consumed_samples
        for _ in range(global_batch):
            samples.append(self._pass_over(at))
            at = samples[-1] + 1
        batch = _read_batch(self._reader, samples, self._micro_batch, self._data_rank, self._data_size)
        self.consumed_samples = at
        return batch

    def leave_out(self, ranges: Sequence[tuple[int, int]]) -> None:
        """From now on pass over samples [from, to) of each range. Called by every rank with the same ranges."""
        self.left_out = tuple(sorted({*self.left_out, *((low, high) for low, high in ranges)}))

    def state_dict(self) -> dict[str, JSON]:
        """The position and what it is a position in; JSON, equal on all ranks."""
        return {
            "consumed_samples": self.consumed_samples,
            **_identity(self._prepared, self._seq_len, self._seed),
            **_sizes(self._prepared),
            "tokenizer": self._prepared.tokenizer_hash,
            "left_out": [list(range_) for range_ in self.left_out],
            "changes": list(self._changes),
        }

    def load_state(self, state: Mapping[str, JSON], *, accept_change: bool = False) -> str | None:
        """Go to a saved position, whatever the numbers of ranks were; what was left out stays so.

        accept_change: go on at the same position in other data: sample n is then what it is in a run that had these
        data from the start, so documents of the old data may come again or never. It is noted in the state. Returns the
        fingerprint of the old data if it was another one.
        Raises DataError naming every difference; another tokenizer is never accepted.
        """
        consumed = state.get("consumed_samples")
        if not isinstance(consumed, int) or consumed < 0:
            raise DataError(f"the saved position has consumed_samples = {consumed!r}, needs an integer of 0 or more")
        problem = _position_problem(
            state, self._prepared, seq_len=self._seq_len, seed=self._seed, accept_change=accept_change
        )
        if problem is not None:
            raise DataError(problem)
        self.consumed_samples = consumed
        self.left_out = _ranges(state.get("left_out", []))
        changes = state.get("changes", [])
        self._changes = list(changes) if isinstance(changes, list) else []
        before = str(state["fingerprint"])
        if before == self.fingerprint:
            return None
        self._changes.append({"consumed_samples": consumed, "from": before, "to": self.fingerprint})
        return before

    def _pass_over(self, at: int) -> int:
        while beyond := next((high for low, high in self.left_out if low <= at < high), 0):
            at = beyond
        return at


def _position_problem(
    state: Mapping[str, JSON], prepared: PreparedData, *, seq_len: int, seed: int, accept_change: bool
) -> str | None:
    """Why a saved position is not one in these data, and what can be done about it; None if it is."""
    identity = _identity(prepared, seq_len, seed)
    differing = [name for name, value in identity.items() if state.get(name) != value]
    if differing and differing != ["fingerprint"]:
        named = "; ".join(f"{name}: saved {state.get(name)}, now {identity[name]}" for name in differing)
        return f"the saved position belongs to other data: {named}. Restore the settings, or start a new run."
    if state.get("tokenizer", prepared.tokenizer_hash) != prepared.tokenizer_hash:
        return (
            f"the tokenizer changed ({str(state['tokenizer'])[:8]}, now {prepared.tokenizer_hash[:8]}), and the "
            "weights have learnt the old one. Restore the data, or keep it with data.tokenizer=RUN/tokenizer.json "
            "data.tokenizer_vocab_size=null."
        )
    if not differing or accept_change:
        return None
    sizes = _sizes(prepared)
    changed = [
        f"{saved:,} training {name}, now {size:,}"
        for name, size in sizes.items()
        if isinstance(saved := state.get(name), int)
    ]
    same = "the same numbers of documents and tokens, but other contents, order or data.held_out_fraction"
    what = "; ".join(changed) if any(state.get(name) != size for name, size in sizes.items()) else same
    return (
        f"the data changed under the run: fingerprint {str(state.get('fingerprint'))[:8]}, now "
        f"{prepared.fingerprint[:8]} ({what}). Restore the data, start a new run, or go on at sample "
        f"{state.get('consumed_samples')} of the new data with --accept-data-change (it is recorded)."
    )


def _identity(prepared: PreparedData, seq_len: int, seed: int) -> dict[str, int | str]:
    return {"fingerprint": prepared.fingerprint, "seq_len": seq_len, "seed": seed}


def _sizes(prepared: PreparedData) -> dict[str, int]:
    return {"documents": prepared.num_train_documents, "tokens": prepared.num_train_tokens}


def held_out_batches(
    prepared: PreparedData,
    *,
    seq_len: int,
    num_samples: int,
    global_batch: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
) -> Iterator[Batch]:
    """The first num_samples held-out samples in the order of the file, the same at every evaluation.

    global_batch at a time, spread over the data ranks as in training; the last batch may be smaller. Raises DataError
    if the held-out documents make fewer samples, or the numbers are no multiples of micro_batch * data_size.
    """
    problem = prepared.evaluation_problem(seq_len, num_samples)
    if problem is not None:
        raise DataError(problem)
    reader = SampleReader(prepared.held_out(), seq_len=seq_len, seed=None)
    steps = [range(start, min(start + global_batch, num_samples)) for start in range(0, num_samples, global_batch)]
    return (_read_batch(reader, samples, micro_batch, data_rank, data_size) for samples in steps)


def _ranges(value: JSON) -> tuple[tuple[int, int], ...]:
    """Pairs out of a saved state. Raises DataError for anything else."""
    pairs = [tuple(pair) for pair in value if isinstance(pair, list)] if isinstance(value, list) else None
    if pairs is None or any(len(pair) != 2 or any(type(end) is not int for end in pair) for pair in pairs):
        raise DataError(f"the saved position has left_out = {str(value)[:80]}, needs pairs of sample numbers")
    return tuple((int(str(low)), int(str(high))) for low, high in pairs)


def _read_batch(
    reader: SampleReader, samples: Sequence[int], micro_batch: int, data_rank: int, data_size: int
) -> Batch:
    width = micro_batch * data_size
    if len(samples) == 0 or len(samples) % width:
        nearest = sorted({max(len(samples) // width, 1) * width, (len(samples) // width + 1) * width})
        raise DataError(
            f"a batch of {len(samples)} samples, needs a multiple of micro_batch ({micro_batch}) x data ranks "
            f"({data_size}) = {width}. Nearest: {', '.join(map(str, nearest))}."
        )
    first = data_rank * micro_batch
    mine = [samples[start + offset] for start in range(first, len(samples), width) for offset in range(micro_batch)]
    read = [reader.sample(number) for number in mine]
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in read]))
    tokens = tokens.view(len(samples) // width, micro_batch, reader.order.seq_len + 1)
    return Batch(
        tokens_MBS=tokens[..., :-1].contiguous(),
        labels_MBS=tokens[..., 1:].contiguous(),
        sample_ids=tuple(mine),
        document_ids=tuple(sample.document_ids for sample in read),
    )
