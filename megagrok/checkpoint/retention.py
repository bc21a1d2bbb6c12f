"""Which folders of a run stay: clearing after a crash, setting an abandoned future aside, pruning. Rank 0 only.

A folder is never emptied under its own name: it is renamed to *.tmp first, so a crash in between leaves something that
nobody takes for a checkpoint and the next save clears. Such a name carries the generation of its writer: two starts of
a run never meet in one, and a start clears those of its own and of earlier ones only.
"""

import re
from collections.abc import Callable
from pathlib import Path

from megagrok.checkpoint.commit import read_commit, step_name, step_of
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fence import Fence
from megagrok.checkpoint.verify import size_problems, verify_checkpoint
from megagrok.errors import CheckpointError

ASIDE, UNFINISHED = ".aside", ".tmp"
_UNFINISHED_PATTERN = re.compile(r"(step-[0-9]{8,18}|latest)(?:\.g([1-9][0-9]{0,8}))?\.tmp")


def unfinished_name(step: int, generation: int) -> str:
    """Where a generation writes a step: step-00000120.g3.tmp, or step-00000120.tmp without a fence."""
    return step_name(step) + (f".g{generation}" if generation else "") + UNFINISHED


def unfinished_hint(generation: int) -> str:
    """Where a generation writes `latest`."""
    return "latest" + (f".g{generation}" if generation else "") + UNFINISHED


def steps_under(root: Path, suffix: str = "") -> list[int]:
    """Steps with a folder of that suffix under `root`, newest first; none if `root` does not exist. Raises OSError."""
    if not root.exists():
        return []
    names = [path.name for path in root.iterdir() if path.name.endswith(suffix)]
    steps = [step_of(name.removesuffix(suffix)) for name in names]
    return sorted((step for step in steps if step is not None), reverse=True)


def clear_unfinished(disk: Disk, root: Path, fence: Fence) -> None:
    """Remove what a crash, or an earlier start of the run, left behind. Raises OSError; CheckpointError if fenced off.

    A writer of an earlier start that still lives has nothing to rename into place after this.
    """
    fence.check()
    for path in sorted(root.iterdir()):
        match = _UNFINISHED_PATTERN.fullmatch(path.name)
        if match and int(match[2] or 0) <= fence.generation:
            if path.is_dir():
                disk.remove_tree(path)
            else:
                disk.remove(path)


def set_aside_from(disk: Disk, root: Path, step: int, fence: Fence) -> None:
    """Rename `step` and later ones, so that none of them is newer than the checkpoint about to be committed."""
    for later in steps_under(root):
        if later >= step:
            aside = root / (step_name(later) + ASIDE)
            if aside.exists():
                fence.check()
                disk.remove_tree(aside)
            fence.check()
            disk.rename(root / step_name(later), aside)


def is_complete(folder: Path) -> bool:
    """Whether the commit is sound and every file is there with its size. Digests of files are not checked."""
    try:
        return not size_problems(folder, read_commit(folder)[0])
    except CheckpointError:
        return False


def is_sound(folder: Path) -> bool:
    """Whether nothing at all is wrong. Reads every byte."""
    return not verify_checkpoint(folder)


def prune(disk: Disk, root: Path, keep: int, fence: Fence, counts: Callable[[Path], bool] = is_complete) -> None:
    """Remove what is older than the `keep` newest checkpoints that count, and what was set aside and is replaced.

    One that does not count stays as evidence until it is older than all that are kept. Fewer than two are never kept.
    """
    assert keep >= 2, keep
    kept: list[int] = []
    for older in steps_under(root):
        if len(kept) == keep:
            _remove(disk, root, step_name(older), older, fence)
        elif counts(root / step_name(older)):
            kept.append(older)
    for aside in steps_under(root, ASIDE):
        if aside in kept or (len(kept) == keep and aside < kept[-1]):
            _remove(disk, root, step_name(aside) + ASIDE, aside, fence)


def _remove(disk: Disk, root: Path, name: str, step: int, fence: Fence) -> None:
    going = root / unfinished_name(step, fence.generation)
    fence.check()
    disk.rename(root / name, going)
    disk.remove_tree(going)
