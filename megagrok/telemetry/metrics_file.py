"""metrics.jsonl: one JSON object a line, appended as the run goes. The run's own memory; W&B and the report are copies.

One idea: the file holds each step once, whatever happened. A resumed run continues from a checkpoint that may be older
than the last line, so opening the file at step N first drops what lies beyond N, and a last line that was torn by a
kill. The rewrite is a new file that replaces the old one, so that a kill during it loses nothing.
"""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megagrok.data.lines import LineFile
from megagrok.errors import DataError, MachineError
from megagrok.telemetry.records import EvaluationRecord, GuardRecord, Record, StepRecord, parse_record
from megagrok.whole_file import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What metrics.jsonl holds, in the order of the steps."""

    steps: tuple[StepRecord, ...]
    """The recorded steps."""
    evaluations: tuple[EvaluationRecord, ...]
    """The evaluations."""
    guards: tuple[GuardRecord, ...] = ()
    """The steps that a guard refused, in the order in which they happened."""


class MetricsFile:
    """The open file. Made by `open_metrics`; one process writes. A disk that fails costs lines and ends no step."""

    def __init__(self, path: Path, *, last_step: int, evaluated: frozenset[int]) -> None:
        self._path = path
        self._file = LineFile(path, self._complain)
        self._last_step = last_step
        self._evaluated = set(evaluated)

    def write(self, record: Record) -> None:
        """Append one line; it is in the kernel's hands when this returns.

        An evaluation of a step that the file already has is not written again: a run that resumes at its end measures
        the same weights on the same samples.  What the disk refuses is missing, and said once.
        """
        match record:
            case EvaluationRecord() if record.step in self._evaluated:
                return
            case EvaluationRecord():
                self._evaluated.add(record.step)
            case StepRecord():
                assert record.step > self._last_step, f"step {record.step} after {self._last_step}: a step comes once"
                self._last_step = record.step
        self._file.append(_line(record))

    def go_back(self, last_step: int) -> None:
        """Drop the steps and evaluations after `last_step`; they will come again. What guards said stays."""
        self._file.close()
        try:
            self._evaluated = set(_drop_after(self._path, last_step))
        except OSError as error:
            self._complain(error)
        self._last_step = last_step

    def close(self) -> None:
        """Flush to the disk and close."""
        self._file.sync()
        self._file.close()

    def _complain(self, error: OSError) -> None:
        logger.warning(
            "%s cannot be written (%s): lines will be missing there; training goes on. Free space.", self._path, error
        )


def open_metrics(path: Path, *, last_step: int) -> MetricsFile:
    """Open for appending after step `last_step`; steps and evaluations after it are dropped for good.

    path: metrics.jsonl of the run; its folder exists.  last_step: the checkpoint's step; 0 starts an empty file.
    Call on the one rank that writes.  Raises DataError for a damaged line that is not the last, MachineError if the
    file cannot be rewritten.
    """
    try:
        evaluated = _drop_after(path, last_step)
    except OSError as error:
        raise MachineError(f"{path} cannot be opened for writing: {error}.") from error
    return MetricsFile(path, last_step=last_step, evaluated=evaluated)


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
        guards=tuple(record for record in records if isinstance(record, GuardRecord)),
    )


def _line(record: Record) -> bytes:
    return json.dumps(record.to_json(), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _drop_after(path: Path, last_step: int) -> frozenset[int]:
    """Rewrite the file without the steps and evaluations after `last_step`; returns the steps with an evaluation."""
    # Step 0 is a new run: an evaluation of step 0 that an earlier run left behind is of other weights.
    records = _read_records(path) if last_step > 0 and path.exists() else []
    kept = [record for record in records if record.step <= last_step or isinstance(record, GuardRecord)]
    write_whole(path, b"".join(map(_line, kept)), sync=True)
    return frozenset(record.step for record in kept if isinstance(record, EvaluationRecord))


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
