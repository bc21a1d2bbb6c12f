"""Files to documents through Hugging Face `datasets`, streaming, local files only.

Not a parser of formats: `datasets` opens, unpacks and decodes; what is ours is the place of whatever is wrong. The one
idea: read as a stream, and when something fails look at that file once more to say which byte, line or row it was.

The readers are entered through `Dataset.from_text` and `Dataset.from_parquet`. `load_dataset` opens the same builders
but first asks a server on the network to count the call (datasets 5.2.0, load.py, increase_load_count). JSON lines are
streamed as lines and parsed one by one: the JSON builder infers one schema for all lines, fails on valid files whose
other keys change type, and cannot say which line was bad.
"""

import codecs
import glob
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megagrok.data.magic import explain_bytes
from megagrok.errors import DataError

_PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it stands, for messages."""

    text: str
    place: str


def read_text_files(files: Sequence[Path]) -> Iterator[Document]:
    """One document per file, in the order of the files. Raises DataError at the first byte that is not UTF-8."""
    rows = _stream_text(files, sample_by="document")
    for path in files:
        try:
            row = next(rows)
        except (UnicodeError, OSError, EOFError) as error:
            raise _unreadable(path, error) from error
        yield Document(row, str(path))


def read_jsonl_files(files: Sequence[Path], text_field: str) -> Iterator[Document]:
    """One document per line, blank lines left out. Raises DataError with the line of a bad one."""
    for path in files:
        rows = _stream_text([path], sample_by="line")
        number = 0
        while True:
            try:
                line = next(rows, None)
            except (UnicodeError, OSError, EOFError) as error:
                raise _unreadable(path, error) from error
            if line is None:
                break
            number += 1
            if line.strip():
                place = f"{path} line {number:,}"
                yield Document(_text_of_line(line, text_field, place), place)


def read_parquet_files(files: Sequence[Path], text_field: str) -> Iterator[Document]:
    """One document per row. Raises DataError if a file is no parquet, has no such column, or a row has no text."""
    from datasets import Dataset

    for path in files:
        _check_parquet(path, text_field)
        with _scratch() as cache:
            pattern = glob.escape(str(path))
            rows = iter(Dataset.from_parquet(pattern, streaming=True, columns=[text_field], cache_dir=cache))
            number = 0
            while True:
                try:
                    row = next(rows, None)
                except (pyarrow.ArrowInvalid, OSError) as error:
                    raise DataError(f"{path} after row {number:,}: damaged ({_first_line(error)})") from error
                if row is None:
                    break
                number += 1
                if row[text_field] is None:
                    raise DataError(f"{path} row {number:,}: {text_field!r} is null, needs text")
                yield Document(row[text_field], f"{path} row {number:,}")


def _stream_text(files: Sequence[Path], *, sample_by: str) -> Iterator[str]:
    # Imported here because it takes a second, which a run on prepared data need not wait for.
    from datasets import Dataset

    # datasets takes every path for a pattern, and finds nothing for one that holds a bracket.
    patterns = [glob.escape(str(path)) for path in files]
    with _scratch() as cache:
        stream = Dataset.from_text(patterns, streaming=True, sample_by=sample_by, encoding="utf-8-sig", cache_dir=cache)
        yield from (row["text"] for row in stream)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Where datasets may put its locks, even for a stream: by default below the home, which nodes may not let write."""
    return tempfile.TemporaryDirectory(prefix="megagrok-datasets-")


def _text_of_line(line: str, text_field: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {_json_name(value)}, needs an object with the key {text_field!r}")
    if text_field not in value:
        keys = ", ".join(repr(key) for key in list(value)[:10]) or "none"
        raise DataError(
            f"{place}: no {text_field!r} key (keys: {keys}). Set text_field to the key that holds the text."
        )
    text = value[text_field]
    if not isinstance(text, str):
        raise DataError(f"{place}: {text_field!r} is {_json_name(text)}, needs text")
    return text


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a text"
    return f"{json.dumps(value)[:20]}"


def _check_parquet(path: Path, text_field: str) -> None:
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        with path.open("rb") as file:
            hint = explain_bytes(file.read(16))
        raise DataError(f"{path}: not a parquet file{hint} ({_first_line(error)})") from error
    if text_field not in schema.names:
        columns = ", ".join(repr(name) for name in schema.names[:10])
        raise DataError(
            f"{path}: no {text_field!r} column (columns: {columns}). Set text_field to the one with the text."
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise DataError(f"{path}: column {text_field!r} is {kind}, needs string")


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that could not be opened, unpacked or decoded, with the byte if it is one."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            at, bad = _first_bad_byte(file)
    except OSError as reason:
        return DataError(f"{path}: cannot be read: {reason.strerror}")
    if not isinstance(error, UnicodeError):
        return DataError(f"{path}: cannot be unpacked or read: {_first_line(error)}")
    if path.suffix in _PACKED_ENDINGS:
        return DataError(f"{path}: what it unpacks to is not UTF-8 ({error})")
    assert at is not None, f"{path} decodes on a second look"
    hint = explain_bytes(head) or f" (0x{bad:02x}). Convert it, for instance with iconv."
    return DataError(f"{path} byte {at:,}: not UTF-8{hint}")


def _first_bad_byte(file: Any) -> tuple[int | None, int]:
    """Offset and value of the first byte that no UTF-8 text has there; None if there is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    while True:
        chunk = file.read(1 << 20)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return position - pending + error.start, error.object[error.start]
        if not chunk:
            return None, 0
        position += len(chunk)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
