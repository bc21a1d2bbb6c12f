"""Which folders of a run stay: clearing after a crash, setting an abandoned future aside, pruning. Rank 0 only.

A folder is never emptied under its own name: it is renamed to *.tmp first, so a crash in between leaves something that
nobody takes for a checkpoint and the next save clears.
"""

from pathlib import Path

from megagrok.checkpoint.commit import read_commit, step_name, step_of
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.verify import size_problems
from megagrok.errors import CheckpointError

ASIDE, UNFINISHED = ".aside", ".tmp"


def steps_under(root: Path, suffix: str = "") -> list[int]:
    """Steps with a folder of that suffix under `root`, newest first; none if `root` does not exist. Raises OSError."""
    if not root.exists():
        return []
    names = [path.name for path in root.iterdir() if path.name.endswith(suffix)]
    steps = [step_of(name.removesuffix(suffix)) for name in names]
    return sorted((step for step in steps if step is not None), reverse=True)


def clear_unfinished(disk: Disk, root: Path) -> None:
    """Remove what a crash left behind."""
    for step in steps_under(root, UNFINISHED):
        disk.remove_tree(root / (step_name(step) + UNFINISHED))


def set_aside_from(disk: Disk, root: Path, step: int) -> None:
    """Rename `step` and later ones, so that none of them is newer than the checkpoint about to be committed."""
    for later in steps_under(root):
        if later >= step:
            aside = root / (step_name(later) + ASIDE)
            if aside.exists():
                disk.remove_tree(aside)
            disk.rename(root / step_name(later), aside)


def prune(disk: Disk, root: Path, keep: int) -> None:
    """Remove what is older than the `keep` newest complete checkpoints, and what was set aside and is replaced.

    An incomplete checkpoint counts for nothing, and stays as evidence until it is older than all that are kept.
    """
    kept: list[int] = []
    for older in steps_under(root):
        if len(kept) == keep:
            _remove(disk, root, step_name(older), older)
        elif is_complete(root / step_name(older)):
            kept.append(older)
    for aside in steps_under(root, ASIDE):
        if (root / step_name(aside)).exists() or (len(kept) == keep and aside < kept[-1]):
            _remove(disk, root, step_name(aside) + ASIDE, aside)


def is_complete(folder: Path) -> bool:
    """Whether the commit is sound and every file is there with its size. Digests of files are not checked."""
    try:
        return not size_problems(folder, read_commit(folder)[0])
    except CheckpointError:
        return False


def _remove(disk: Disk, root: Path, name: str, step: int) -> None:
    going = root / (step_name(step) + UNFINISHED)
    disk.rename(root / name, going)
    disk.remove_tree(going)
