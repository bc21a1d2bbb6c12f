"""The same tensors in another number of files. One process, one file's tensors in memory at a time.

A load needs no resharding: any layout reads any layout. This is for moving a checkpoint to where other file sizes are
wanted. Bytes are verified as they come in, as they lie in the new files, and tensor by tensor against each other.
"""

from bisect import bisect_right
from itertools import accumulate
from math import ceil, prod
from pathlib import Path

import torch

from megagrok.checkpoint.commit import read_commit
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fence import Unfenced
from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.load import Checkpoint
from megagrok.checkpoint.save import Save, commit_shards, discard
from megagrok.checkpoint.shard import disk_failure, write_shard
from megagrok.checkpoint.verify import verify_checkpoint
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON, Alone

MAX_FILES = 100_000


def reshard(source: Path, out: Path, num_files: int) -> Path:
    """Write the checkpoint in the folder `source` as `num_files` files under `out`; returns the new folder.

    Raises CheckpointError if a byte of the source is not what was committed, if `out` has the step already or no room,
    and if what was written does not verify or differs: then nothing is left there.
    """
    if not 1 <= num_files <= MAX_FILES:
        raise CheckpointError(f"{num_files} files are not possible; 1 to {MAX_FILES} are")
    commit, _ = read_commit(source)
    checkpoint = Checkpoint(source, commit)
    save = Save(Disk(), out, commit.step, commit.facts, Alone(), 2, Unfenced())
    if save.target.exists():
        raise CheckpointError(f"{save.target} exists already: name another folder")
    _make_folder(save, sum(_bytes_of(checkpoint, name) for name in checkpoint.names()), num_files)
    try:
        reports: list[JSON] = []
        for number, pieces in enumerate(_shares(checkpoint, num_files)):
            fragments = [_piece(checkpoint, *piece) for piece in pieces]
            marks = {"step": str(commit.step), "file": str(number), "files": str(num_files)}
            path = save.folder / f"rank-{number:05d}.safetensors"
            reports.append(write_shard(save.disk, path, fragments, marks, are_private=True))
        commit_shards(save, reports)
    except CheckpointError:
        discard(save)
        raise
    problems = verify_checkpoint(save.target) or _differences(checkpoint, save.target)
    if problems:
        save.disk.remove_tree(save.target)
        raise CheckpointError(f"{save.target} was not what had been read, and is removed: {'; '.join(problems[:3])}")
    return save.target


def _make_folder(save: Save, needed_bytes: int, num_files: int) -> None:
    try:
        save.disk.make_directory(save.folder)
        lack = save.disk.free_space(save.root).lack(save.root, needed_bytes, num_files + 2)
    except OSError as error:
        raise disk_failure(save.folder, error) from error
    if lack is not None:
        discard(save)
        raise CheckpointError(lack)


def _bytes_of(checkpoint: Checkpoint, name: str) -> int:
    return prod(checkpoint.shape_of(name)) * checkpoint.dtype_of(name).itemsize


def _shares(checkpoint: Checkpoint, num_files: int) -> list[list[tuple[str, int, int]]]:
    """(name, first element, end) for each file: all tensors in a row, cut into files of about the same size."""
    names = checkpoint.names()
    ends = list(accumulate(_bytes_of(checkpoint, name) for name in names))
    total = ends[-1] if ends else 0
    shares: list[list[tuple[str, int, int]]] = [[] for _ in range(num_files)]
    cuts = [total * number // num_files for number in range(num_files + 1)]
    for name, end in zip(names, ends, strict=True):
        width, size = checkpoint.dtype_of(name).itemsize, _bytes_of(checkpoint, name)
        begin = end - size
        if size == 0:
            shares[min(bisect_right(cuts, begin), num_files) - 1].append((name, 0, 0))
        for number in range(num_files):
            # Rounded up at both ends, so that neighbours agree on whose an element is.
            low = ceil(max(cuts[number] - begin, 0) / width)
            high = ceil(min(max(cuts[number + 1] - begin, 0), size) / width)
            if low < high:
                shares[number].append((name, low, high))
    return shares


def _piece(checkpoint: Checkpoint, name: str, begin: int, end: int) -> Fragment:
    shape = checkpoint.shape_of(name)
    start = (0,) * len(shape)
    data = checkpoint.read(name, start, shape).reshape(-1)[begin:end]
    return Fragment(name, shape, start, shape, begin, end, data.clone())


def _differences(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Tensors of the two that are not the same bits."""
    written = Checkpoint(target, read_commit(target)[0])
    if written.names() != checkpoint.names():
        return ["the tensors have other names"]
    return [name for name in checkpoint.names() if not _same(checkpoint, written, name)]


def _same(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    if a.shape_of(name) != b.shape_of(name) or a.dtype_of(name) != b.dtype_of(name):
        return False
    whole = ((0,) * len(a.shape_of(name)), a.shape_of(name))
    bits = (other.read(name, *whole).reshape(-1).view(torch.uint8) for other in (a, b))
    return torch.equal(*bits)
