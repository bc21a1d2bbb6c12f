"""Whether the files of a checkpoint are what its commit says. Reads, never repairs."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from megagrok.checkpoint.commit import COMMIT_NAME, Commit, ShardFile, read_commit
from megagrok.checkpoint.disk import open_file, read_range
from megagrok.errors import CheckpointError

CHUNK_BYTES = 1 << 22


def size_problems(folder: Path, commit: Commit) -> list[str]:
    """Files of the commit that are missing, of another kind, or of another size; one line each."""
    return _problems(_check_size(folder / file.name, file) for file in commit.files)


def digest_problems(folder: Path, files: Iterable[ShardFile]) -> list[str]:
    """Files whose bytes are not the ones that were committed; one line each. Reads all of them once."""
    return _problems(_check_digest(folder / file.name, file) for file in files)


def verify_checkpoint(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint in this folder, one line each; empty if it is sound.

    Any one process may call it. It reads every byte.
    """
    try:
        commit, _ = read_commit(path)
    except CheckpointError as error:
        return [str(error)]
    problems = size_problems(path, commit)
    sound = [
        file for file in commit.files if not any(problem.startswith(f"{path / file.name}:") for problem in problems)
    ]
    known = {COMMIT_NAME, *(file.name for file in commit.files)}
    strangers = sorted(other.name for other in path.iterdir() if other.name not in known)
    return problems + digest_problems(path, sound) + [f"{path / name}: is not in {COMMIT_NAME}" for name in strangers]


def _problems(checks: Iterable[str | None]) -> list[str]:
    return [problem for problem in checks if problem is not None]


def _check_size(path: Path, file: ShardFile) -> str | None:
    try:
        descriptor, size = open_file(path)
    except CheckpointError as error:
        return str(error)
    with open(descriptor, "rb"):
        return None if size == file.size_bytes else f"{path}: has {size} bytes, {file.size_bytes} were committed"


def _check_digest(path: Path, file: ShardFile) -> str | None:
    hasher = xxhash.xxh3_128()
    try:
        descriptor, size = open_file(path)
        with open(descriptor, "rb"):
            if size != file.size_bytes:
                return f"{path}: has {size} bytes, {file.size_bytes} were committed"
            for offset in range(0, size, CHUNK_BYTES):
                hasher.update(read_range(path, descriptor, offset, min(CHUNK_BYTES, size - offset)))
    except CheckpointError as error:
        return str(error)
    found = hasher.hexdigest()
    return None if found == file.digest else f"{path}: its digest is {found}, {file.digest} was committed"
