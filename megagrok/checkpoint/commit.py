"""COMMIT.json: the page that makes a folder of shards a checkpoint. Encoding, strict decoding, and what must hold.

Not a lock and not a signature: the digests find rot and mix-ups, not an attacker who rewrites files and digests alike.
The one idea: the reader hashes the page before it parses it, checks every number before it uses one, and then trusts
the page alone; the headers inside the shard files are for other programs and are never read here.

    {"digest":"<xxh3_128 of the bytes of the value of commit>","commit":{...}}
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megagrok.checkpoint.disk import open_file, read_range
from megagrok.checkpoint.fragment import DTYPES, fragment_problem
from megagrok.checkpoint.geometry import Box, Index, Piece, cover_problem
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON

FORMAT = 1
COMMIT_NAME = "COMMIT.json"
MAX_COMMIT_BYTES = 1 << 28
MAX_NUMBER = 1 << 60
SHARD_PATTERN = re.compile(r"rank-[0-9]{5,9}\.safetensors")
STEP_PATTERN = re.compile(r"step-([0-9]{8,18})")
DIGEST_PATTERN = re.compile(r"[0-9a-f]{32}")
_OPEN, _MIDDLE, _CLOSE = b'{"digest":"', b'","commit":', b"}\n"
_BODY_BEGIN = len(_OPEN) + 32 + len(_MIDDLE)


class NewerFormat(CheckpointError):
    """Sound as far as can be told, and of a format that this build does not know."""


class _NewerNumber(ValueError):
    """The page says so."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One fragment where it lies in a file."""

    name: str
    piece: Piece
    offset: int
    """First byte in the file."""
    digest: str
    """xxh3_128 of the fragment's bytes, as hex."""

    def to_json(self) -> JSON:
        """The entry as COMMIT.json holds it."""
        (start, shape), begin, end = self.piece
        return [self.name, list(start), list(shape), begin, end, self.offset, self.digest]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One rank's file."""

    name: str
    size_bytes: int
    digest: str
    """xxh3_128 of the whole file, as hex."""
    entries: tuple[Entry, ...]

    def to_json(self) -> JSON:
        """The file as COMMIT.json holds it."""
        entries = [entry.to_json() for entry in self.entries]
        return {"name": self.name, "bytes": self.size_bytes, "digest": self.digest, "entries": entries}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What all fragments of a tensor agree on."""

    dtype: str
    """Name of the dtype in the safetensors format."""
    shape: Index

    def to_json(self) -> JSON:
        """The tensor as COMMIT.json holds it."""
        return [self.dtype, list(self.shape)]


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint without its bytes."""

    step: int
    facts: Mapping[str, JSON]
    tensors: Mapping[str, TensorInfo]
    files: tuple[ShardFile, ...]

    def entry_bytes(self, entry: Entry) -> int:
        """Bytes of an entry in its file."""
        return (entry.piece.end - entry.piece.begin) * DTYPES[self.tensors[entry.name].dtype].itemsize

    def to_bytes(self) -> bytes:
        """The whole of COMMIT.json. Raises TypeError or ValueError if the facts are not JSON."""
        tensors: JSON = {name: info.to_json() for name, info in self.tensors.items()}
        files: JSON = [file.to_json() for file in self.files]
        facts = dict(self.facts)
        body = canonical_json({"format": FORMAT, "step": self.step, "facts": facts, "tensors": tensors, "files": files})
        return _OPEN + digest_of(body).encode() + _MIDDLE + body + _CLOSE


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """The digest of this format: xxh3_128 as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def canonical_json(value: JSON) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, ASCII; refuses NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def step_name(step: int) -> str:
    """Folder name of a step: step-00000120."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder name, or None for any other spelling."""
    match = STEP_PATTERN.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def read_commit(folder: Path) -> tuple[Commit, str]:
    """Read and check folder/COMMIT.json; returns it with its digest. Raises CheckpointError naming the file."""
    path = folder / COMMIT_NAME
    data = _read_page(path)
    digest, body = data[len(_OPEN) : _BODY_BEGIN - len(_MIDDLE)].decode("ascii", "replace"), data[_BODY_BEGIN:-2]
    found = digest_of(memoryview(body))
    if found != digest:
        raise CheckpointError(f"{path}: its digest is {found}, it says {digest!r}: damaged or edited by hand")
    try:
        value: JSON = json.loads(body, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        commit = commit_from_json(value)
    except _NewerNumber as error:
        raise NewerFormat(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if step_of(folder.name.split(".")[0]) not in (commit.step, None):
        raise CheckpointError(f"{path}: is of step {commit.step}, in the folder of another step")
    return commit, digest


def _read_page(path: Path) -> bytearray:
    descriptor, size = open_file(path)
    with open(descriptor, "rb"):
        if not _BODY_BEGIN < size <= MAX_COMMIT_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, a commit has {_BODY_BEGIN} to {MAX_COMMIT_BYTES}")
        data = read_range(path, descriptor, 0, size)
    framed = data.startswith(_OPEN) and data[_BODY_BEGIN - len(_MIDDLE) : _BODY_BEGIN] == _MIDDLE
    if not framed or not data.endswith(_CLOSE):
        raise CheckpointError(f'{path}: is not of the form {{"digest":"...","commit":...}}: damaged or cut short')
    return data


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _refuse_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not JSON")


def commit_from_json(value: JSON) -> Commit:
    """From JSON to types. Raises ValueError for any other form, a gap, an overlap, or an impossible number."""
    seen = value.get("format") if isinstance(value, dict) else None
    if type(seen) is int and seen > FORMAT:
        raise _NewerNumber(
            f"format {str(seen)[:20]}, this build reads {FORMAT}: use the build that wrote it, or a newer one"
        )
    if not isinstance(value, dict) or type(seen) is not int or seen != FORMAT:
        raise ValueError(f"format {seen!r}, this build reads {FORMAT}")
    page = _fields(value, "format", "step", "facts", "tensors", "files")
    facts, tensors, files = page["facts"], page["tensors"], page["files"]
    if not isinstance(facts, dict) or not isinstance(tensors, dict) or not isinstance(files, list):
        raise ValueError("facts and tensors are objects, files is a list")
    infos = {}
    for name, info in tensors.items():
        if not isinstance(info, list) or len(info) != 2 or not isinstance(info[0], str) or info[0] not in DTYPES:
            raise ValueError(f"tensor {name[:80]!r} needs [dtype, shape] with one of the dtypes {', '.join(DTYPES)}")
        infos[name] = TensorInfo(info[0], _index(info[1]))
    commit = Commit(_number(page["step"]), facts, infos, tuple(_decode_file(file) for file in files))
    _check(commit)
    return commit


def _decode_file(value: JSON) -> ShardFile:
    file = _fields(value, "name", "bytes", "digest", "entries")
    name, entries = file["name"], file["entries"]
    if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
        raise ValueError(f"a shard cannot be called {str(name)[:80]!r}; names are rank-00000.safetensors and so on")
    if not isinstance(entries, list):
        raise ValueError(f"the entries of {name} are not a list")
    return ShardFile(name, _number(file["bytes"]), _digest(file["digest"]), tuple(map(_decode_entry, entries)))


def _decode_entry(value: JSON) -> Entry:
    if not isinstance(value, list) or len(value) != 7 or not isinstance(value[0], str):
        raise ValueError("an entry is [name, start, shape, begin, end, offset, digest]")
    name, start, shape, begin, end, offset, digest = value
    piece = Piece(Box(_index(start), _index(shape)), _number(begin), _number(end))
    return Entry(str(name), piece, _number(offset), _digest(digest))


def _fields(value: JSON, *names: str) -> dict[str, JSON]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"an object does not have exactly the keys {', '.join(names)}")
    return value


def _number(value: JSON) -> int:
    if type(value) is not int or not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{str(value)[:80]} is not a whole number in 0..{MAX_NUMBER}")
    return value


def _index(value: JSON) -> Index:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError(f"{str(value)[:80]} is not a list of sizes")
    return tuple(map(_number, value))


def _digest(value: JSON) -> str:
    if not isinstance(value, str) or not DIGEST_PATTERN.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is not a digest of 32 hex digits")
    return value


def _check(commit: Commit) -> None:
    """Raise ValueError unless entries fill their files without overlap and cover every tensor exactly once.

    Entries that shared bytes could claim more memory than the files have; a tensor with a hole would be read as
    whatever the allocator left there. Entries are checked before tensors, so a tensor is never larger than its files.
    """
    names = [file.name for file in commit.files]
    if len(set(names)) != len(names):
        raise ValueError("a file appears twice")
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for file in commit.files:
        for entry in file.entries:
            if entry.name not in commit.tensors:
                raise ValueError(f"{file.name} holds {entry.name[:80]!r}, which is not among the tensors")
            if problem := fragment_problem(entry.name, commit.tensors[entry.name].shape, entry.piece):
                raise ValueError(f"{file.name}: {entry.name[:80]!r}: {problem}")
            pieces[entry.name].append(entry.piece)
        _check_offsets(commit, file)
    problems = []
    for name, info in sorted(commit.tensors.items()):
        if problem := cover_problem(info.shape, pieces[name]) if name in pieces else "no rank holds it":
            problems.append(f"tensor {name} {list(info.shape)} is incomplete: {problem}")
    if problems:
        raise ValueError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more tensors" if problems[3:] else ""))


def _check_offsets(commit: Commit, file: ShardFile) -> None:
    spans = sorted((entry.offset, entry.offset + commit.entry_bytes(entry)) for entry in file.entries)
    position = spans[0][0] if spans else file.size_bytes
    for begin, end in spans:
        if begin != position:
            raise ValueError(f"{file.name}: an entry begins at byte {begin}, the one before it ends at {position}")
        position = end
    if position != file.size_bytes:
        raise ValueError(f"{file.name}: its entries end at byte {position}, the file has {file.size_bytes}")
