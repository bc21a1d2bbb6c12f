"""metrics.jsonl: one JSON object a line, appended as the run goes. The run's own memory; W&B and the report are copies.

One idea: the file holds each step once, whatever happened. A resumed run continues from a checkpoint that may be older
than the last line, so opening the file at step N first drops what lies beyond N, and a last line that was torn by a
kill. The rewrite is a new file that replaces the old one, so that a kill during it loses nothing.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megagrok.errors import DataError, MachineError
from megagrok.telemetry.records import EvaluationRecord, Record, StepRecord, parse_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What metrics.jsonl holds, in the order of the steps."""

    steps: tuple[StepRecord, ...]
    """The recorded steps."""
    evaluations: tuple[EvaluationRecord, ...]
    """The evaluations."""


class MetricsFile:
    """The open file. Made by `open_metrics`; one process writes."""

    def __init__(self, path: Path, stream: TextIO, *, last_step: int, evaluated: frozenset[int]) -> None:
        self._path = path
        self._stream = stream
        self._last_step = last_step
        self._evaluated = set(evaluated)

    def write(self, record: Record) -> None:
        """Append one line; it is in the kernel's hands when this returns.

        An evaluation of a step that the file already has is not written again: a run that resumes at its end measures
        the same weights on the same samples.  Raises MachineError if the disk refuses.
        """
        if isinstance(record, EvaluationRecord):
            if record.step in self._evaluated:
                return
            self._evaluated.add(record.step)
        else:
            assert record.step > self._last_step, f"step {record.step} after {self._last_step}: a step is written once"
            self._last_step = record.step
        try:
            self._stream.write(_line(record))
        except OSError as error:
            raise MachineError(f"{self._path} cannot be written: {error}. Free space there, then resume.") from error

    def close(self) -> None:
        """Flush to the disk and close."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def open_metrics(path: Path, *, last_step: int) -> MetricsFile:
    """Open for appending after step `last_step`; lines of later steps are dropped for good.

    path: metrics.jsonl of the run; its folder exists.  last_step: the checkpoint's step; 0 starts an empty file.
    Call on the one rank that writes.  Raises DataError for a damaged line that is not the last, MachineError if the
    file cannot be opened or rewritten.
    """
    try:
        # Step 0 is a new run: an evaluation of step 0 that an earlier run left behind is of other weights.
        records = _read_records(path) if last_step > 0 and path.exists() else []
        kept = [record for record in records if record.step <= last_step]
        _replace(path, "".join(map(_line, kept)))
        # Line-buffered: a kill loses at most the line that was being written.
        stream = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise MachineError(f"{path} cannot be opened for writing: {error}.") from error
    evaluated = frozenset(record.step for record in kept if isinstance(record, EvaluationRecord))
    return MetricsFile(path, stream, last_step=last_step, evaluated=evaluated)


def read_metrics(path: Path) -> Metrics:
    """All records of the file; a torn last line, of a run that lives or was killed, is left out.

    Raises DataError if the file is missing or another line cannot be read.
    """
    try:
        records = _read_records(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: the run has not made a step, or this is not a run's folder."
        ) from error
    return Metrics(
        steps=tuple(record for record in records if isinstance(record, StepRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvaluationRecord)),
    )


def _line(record: Record) -> str:
    return json.dumps(record.to_json(), allow_nan=False, separators=(",", ":")) + "\n"


def _read_records(path: Path) -> list[Record]:
    # Bytes, because a line torn by a power loss need not be UTF-8.
    lines = path.read_bytes().split(b"\n")
    unfinished = lines.pop()  # what follows the last newline: empty, or torn
    records = [_decode(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    if unfinished:
        # A whole record that only lost its newline is kept.
        with suppress(DataError):
            records.append(_decode(unfinished, f"{path}:{len(lines) + 1}"))
    return records


def _decode(line: bytes, place: str) -> Record:
    try:
        decoded = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}. Move the file away to go on without its past.") from error
    if not isinstance(decoded, dict):
        raise DataError(f"{place}: a {type(decoded).__name__}, expected an object. Move the file away to go on.")
    return parse_record(decoded, place=place)


def _replace(path: Path, text: str) -> None:
    """Put `text` at `path` whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, path)
