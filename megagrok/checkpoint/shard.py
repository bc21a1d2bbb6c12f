"""One rank's file: a valid safetensors file of its fragments, hashed while it is written.

Written here and not by the safetensors library because the digests must be of exactly the bytes that go to the disk,
and because only a piece of one fragment is then held in host memory. The library reads the result.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash

from megagrok.checkpoint.commit import Entry, ShardFile, TensorInfo
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fragment import DTYPE_NAMES, Fragment
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON

# Hashed and written piece by piece: some versions of the hash hold the interpreter lock, and the run wants it too.
CHUNK_BYTES = 1 << 23


def write_shard(
    disk: Disk, path: Path, fragments: Iterable[Fragment], marks: dict[str, str], are_private: bool = False
) -> JSON:
    """Write and sync `path`; returns {"file": as in COMMIT.json, "tensors": {name: [dtype, shape]}}.

    marks: text for the header's metadata.  are_private: the fragments' memory is the host's and nobody writes to it.
    Raises CheckpointError, also for a full disk.
    """
    ordered = file_order(fragments)
    tensors = _tensor_table(ordered)
    header = _header(ordered, marks)
    needed = len(header) + sum(fragment.num_bytes for fragment in ordered)
    entries, position, whole = [], len(header), xxhash.xxh3_128(header)
    bounce = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    try:
        descriptor = disk.create(path)
        try:
            disk.write(descriptor, header)
            for fragment in ordered:
                part = xxhash.xxh3_128()
                for chunk in _chunks(fragment.data, None if are_private else bounce):
                    part.update(chunk)
                    whole.update(chunk)
                    disk.write(descriptor, chunk)
                entries.append(Entry(fragment.name, fragment.piece, position, part.hexdigest()))
                position += fragment.num_bytes
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.sync_directory(path.parent)
    except OSError as error:
        raise disk_failure(path, error, needed) from error
    return {"file": ShardFile(path.name, position, whole.hexdigest(), tuple(entries)).to_json(), "tensors": tensors}


def disk_failure(path: Path, error: OSError, needed_bytes: int = 0) -> CheckpointError:
    """What the operating system said, with the place and, on a full disk, the sizes."""
    text = f"{error.filename or path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        status = os.statvfs(next(folder for folder in path.absolute().parents if folder.exists()))
        free = status.f_bavail * status.f_frsize
        text += (
            f" (this file needs {needed_bytes / 1e6:.1f} MB; {free / 1e6:.1f} MB are free after its part was written)"
        )
    return CheckpointError(text)


def file_order(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Wide dtypes first: each entry is then aligned to its own size, as the format's own writer does it."""
    return sorted(fragments, key=lambda f: (-f.data.dtype.itemsize, f.name, f.start, f.begin))


def _chunks(data: torch.Tensor, bounce: torch.Tensor | None) -> Iterator[memoryview]:
    """The bytes of the elements in pieces of at most CHUNK_BYTES, each valid until the next is asked for.

    They pass through `bounce`, host memory that is ours alone, so nothing can change between hashing and writing; with
    None they are taken where they lie.
    """
    step = CHUNK_BYTES // data.dtype.itemsize
    for begin in range(0, data.numel(), step):
        piece = data[begin : begin + step]
        if bounce is not None:
            copy = bounce[: piece.numel() * data.dtype.itemsize].view(data.dtype)
            copy.copy_(piece.detach())
            piece = copy
        yield piece.view(torch.uint8).numpy().data


def _header(fragments: list[Fragment], marks: dict[str, str]) -> bytes:
    table: dict[str, JSON] = {"__metadata__": {"format": "pt", **marks}}
    position = 0
    for fragment in fragments:
        if fragment.key in table:
            raise CheckpointError(f"{fragment.key} is given twice")
        end = position + fragment.num_bytes
        shape = fragment.shape if fragment.key == fragment.name else (fragment.end - fragment.begin,)
        dtype = DTYPE_NAMES[fragment.data.dtype]
        table[fragment.key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_table(fragments: list[Fragment]) -> JSON:
    table: dict[str, JSON] = {}
    for fragment in fragments:
        info = TensorInfo(DTYPE_NAMES[fragment.data.dtype], fragment.global_shape).to_json()
        if table.setdefault(fragment.name, info) != info:
            raise CheckpointError(f"tensor {fragment.name} is both {table[fragment.name]} and {info}")
    return table
