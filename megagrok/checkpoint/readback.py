"""Reading an older checkpoint back before others are removed, so that two which verify always stay. Removes nothing."""

from pathlib import Path

from megagrok.checkpoint.commit import read_commit, step_name
from megagrok.checkpoint.retention import is_complete, steps_under
from megagrok.checkpoint.together import together
from megagrok.checkpoint.verify import digest_problems
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON, Ranks


def damaged_before(root: Path, new: int, keep: int, ranks: Ranks, failed: str) -> set[Path]:
    """Checkpoints beside that of step `new` which look complete and are not, up to the newest one that is sound.

    Collective. Rot is found while there is still something else to keep. Reads one checkpoint as a rule, shared out
    over the ranks, and only if there are more than `keep`, so that some go. The new one was hashed on its way to the
    disk. Raises CheckpointError, which begins with `failed`, on all ranks.
    """

    def complete() -> JSON:
        steps = steps_under(root) if ranks.rank == 0 else []
        older = [step for step in steps if step != new]
        return [step for step in older if is_complete(root / step_name(step))] if len(steps) > keep else []

    damaged: set[Path] = set()
    steps = together(ranks, failed, complete)[0]
    assert isinstance(steps, list)
    for step in steps:
        folder = root / step_name(int(str(step)))
        if not ranks.any(not _is_share_sound(folder, ranks)):
            break
        damaged.add(folder)
    return damaged


def _is_share_sound(folder: Path, ranks: Ranks) -> bool:
    try:
        commit, _ = read_commit(folder)
    except CheckpointError:
        return False
    return not digest_problems(folder, commit.files[ranks.rank :: ranks.world_size])
