"""The data ledger: which samples each step really used, one file per data rank, appended over all starts of a run.

    ledger/data-00000.jsonl   {"kind":"begin",...}   a start of the run, or a way back to an earlier step inside one
                              {"kind":"step",...}    a finished step of this data rank
                              {"kind":"data_change",...}   other data were accepted on the record

Not a log for people and no part of the training: trouble with the disk is said once and costs lines, never a step; the
audit (audit.py) then names the gap. The one idea: nothing is ever rewritten. A start that goes back to step C does not
remove the lines after C; it writes that it begins at C, and the reader leaves out what was abandoned. Needs no torch.

A *part* of a generation is what lies between two ways back: part 0 begins with the start, the next ones at a rewind.
Each line ends with a CRC of itself, so that an edited or torn one is known by its number.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from megagrok.data.lines import TAIL_BYTES, LineFile
from megagrok.errors import DataError

Action = Literal["trained", "skipped", "rewound", "refused"]
"""What came of a step's samples: an update; none, and the run went on (skipped), back (rewound) or ended (refused)."""
Run = tuple[int, int, int, int]
"""Samples first + i * stride + j for i < count, j < length: (first, count, stride, length)."""
FILE_PATTERN = "data-?????.jsonl"
_CRC = ',"crc":'


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """This data rank starts, or goes back, and goes on from there."""

    kind: ClassVar[str] = "begin"
    generation: int
    part: int
    data_rank: int
    data_size: int
    step: int
    """The last step that counts; the next line is of the step after it."""
    consumed_samples: int
    """Position after that step."""
    samples_per_epoch: int
    fingerprint: str
    """Of the data."""
    left_out: tuple[tuple[int, int], ...]
    """Samples [from, to) that a guard has taken out of the run's order; passed over when they come up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One finished step of this data rank."""

    kind: ClassVar[str] = "step"
    generation: int
    part: int
    data_rank: int
    data_size: int
    micro_batch: int
    global_batch: int
    step: int
    samples: tuple[Run, ...]
    documents: str
    """Digest of the documents that the samples touch, by their numbers in the token file, in order."""
    action: Action

    def sample_ids(self) -> tuple[int, ...]:
        """The samples, in the order in which the rank was fed."""
        return decode_samples(self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataChange:
    """After `step` the run goes on with other data, and someone has said so on the command line."""

    kind: ClassVar[str] = "data_change"
    generation: int
    part: int
    data_rank: int
    step: int
    before: str
    """Fingerprint of the data so far."""
    after: str


Line = Begin | Step | DataChange


@dataclass(frozen=True, slots=True)
class Damage:
    """A line that cannot be used, and why."""

    place: str
    problem: str


class Ledger:
    """One data rank's file. The one rank that speaks for its data coordinate (tensor = context = pipeline = 0) has one.
    No method raises for what a disk does."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        def complain(error: OSError) -> None:
            say(
                f"the data ledger {path} cannot be written ({error}); training goes on, and `megagrok audit-data` will "
                "name the steps that it cannot account for. Free space there."
            )

        self._file = LineFile(path, complain)

    def write(self, line: Line) -> None:
        """Append a line; it is in the kernel's hands when this returns."""
        self._file.append(encode_line(line))

    def sync(self) -> None:
        """Put what was written on the disk: before a checkpoint whose samples it accounts for."""
        self._file.sync()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def ledger_path(folder: Path, data_rank: int) -> Path:
    """data-00003.jsonl in the run's ledger folder."""
    return folder / f"data-{data_rank:05d}.jsonl"


def next_part(folder: Path, data_rank: int, generation: int) -> int:
    """The part with which `generation` begins in this rank's file: 0, or one more than a start of the same number left.

    Local; 0 if the file is not there or cannot be read.
    """
    try:
        with ledger_path(folder, data_rank).open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            tail = stream.read().split(b"\n")
    except OSError:
        return 0
    for text in reversed(tail):
        try:
            line = decode_line(text)
        except DataError:
            continue
        return line.part + 1 if line.generation == generation else 0
    return 0


def encode_line(line: Line) -> bytes:
    """The line with its CRC and its end."""
    body = json.dumps({"kind": line.kind, **asdict(line)}, separators=(",", ":"))[:-1]
    return f"{body}{_CRC}{zlib.crc32(body.encode())}}}\n".encode()


def decode_line(text: bytes) -> Line:
    """The line that `encode_line` wrote, without its end. Raises DataError for anything else."""
    body, mark, crc = text.rpartition(_CRC.encode())
    if not mark or crc != f"{zlib.crc32(body)}}}".encode():
        raise DataError("is not the line that was written: torn, damaged or edited")
    try:
        value: dict[str, Any] = json.loads(body + b"}")
        kind = {kind.kind: kind for kind in (Begin, Step, DataChange)}[value.pop("kind")]
        if value.keys() != {field.name for field in fields(kind)}:
            raise DataError(f"a {kind.kind} has other keys: {', '.join(value)}")
        for name in ("samples", "left_out"):
            if name in value:
                value[name] = tuple(tuple(map(int, run)) for run in value[name])
        line: Line = kind(**value)
        numbers = (line.generation, line.part, line.data_rank, line.step)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise DataError(f"a number is none: {numbers}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"is no line of a ledger: {error!r}") from error
    return line


def read_ledger(path: Path) -> Iterator[Line | Damage]:
    """The lines of one file in their order; damage where a line cannot be used.

    What follows the last newline was torn by a kill or a power loss, and is passed over: its step never counted, or
    will be missed. Raises DataError if the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            for number, text in enumerate(stream, start=1):
                if not text.endswith(b"\n"):
                    return
                try:
                    yield decode_line(text[:-1])
                except DataError as error:
                    yield Damage(f"{path.name}:{number}", str(error))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def encode_samples(sample_ids: Sequence[int]) -> tuple[Run, ...]:
    """Runs that decode to exactly these ids: a handful for a batch, one each in the worst case."""
    blocks: list[list[int]] = []
    for sample in sample_ids:
        if blocks and sample == blocks[-1][0] + blocks[-1][1]:
            blocks[-1][1] += 1
        else:
            blocks.append([sample, 1])
    runs: list[list[int]] = []
    for first, length in blocks:
        if runs and runs[-1][3] == length and (runs[-1][1] == 1 or first == runs[-1][0] + runs[-1][1] * runs[-1][2]):
            runs[-1][2] = (first - runs[-1][0]) // runs[-1][1]
            runs[-1][1] += 1
        else:
            runs.append([first, 1, length, length])
    packed = tuple((first, count, stride, length) for first, count, stride, length in runs)
    if decode_samples(packed) == tuple(sample_ids):
        return packed
    return tuple((sample, 1, 1, 1) for sample in sample_ids)


def decode_samples(runs: Sequence[Run]) -> tuple[int, ...]:
    """The ids of `encode_samples`."""
    return tuple(
        sample
        for first, count, stride, length in runs
        for block in range(count)
        for sample in range(first + block * stride, first + block * stride + length)
    )


def digest_documents(document_ids: Sequence[Sequence[int]]) -> str:
    """What stands for the documents of a batch in the ledger: 64 bits of SHA-256, as hex."""
    return hashlib.sha256(json.dumps(document_ids, separators=(",", ":")).encode()).hexdigest()[:16]
