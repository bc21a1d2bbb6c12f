"""Recognizing checkpoints of other programs by their names, to refuse them in plain words. Opens no file.

torch.distributed.checkpoint writes .metadata and *.distcp, torch.save *.pt, *.pth and *.bin; Megatron puts them in
iter_* folders and DeepSpeed in global_step* ones. All of them are pickles, or need one to be read.
"""

from pathlib import Path

_NAMES = (".metadata", "latest_checkpointed_iteration.txt")
_ENDINGS = (".distcp", ".pt", ".pth", ".bin", ".pkl")
# A folder with more files than this is looked into no further.
_MAX_NAMES = 10_000


def foreign_file(folder: Path) -> str | None:
    """A file of another program's checkpoint in `folder` or in a folder directly below it, or None."""
    try:
        here = sorted(folder.iterdir())[:_MAX_NAMES]
        below = [path for other in here if other.is_dir() for path in sorted(other.iterdir())[:_MAX_NAMES]]
    except OSError:
        return None
    for path in (*here, *below):
        if path.name in _NAMES or path.suffix in _ENDINGS:
            return str(path)
    return None
