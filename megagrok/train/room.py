"""Whether the checkpoints of a run fit where they are to lie. Asked before a step is made that cannot be saved."""

from pathlib import Path

from megagrok.checkpoint.disk import Disk
from megagrok.config import RunConfig
from megagrok.errors import MachineError
from megagrok.plan import total_params, world_size

# fp32 weights and AdamW's two moments.
_BYTES_PER_PARAMETER = 12
# Complete ones are never fewer than two, and a new one is there before an old one goes.
_CHECKPOINTS = 2


def require_room(run: RunConfig, folder: Path) -> None:
    """Raise MachineError unless two checkpoints fit in `folder`, or one beside those that are there already."""
    there = 0 if not folder.exists() else sum(1 for _ in folder.glob("step-*/COMMIT.json"))
    count = max(_CHECKPOINTS - there, 1)
    needed_bytes = count * _BYTES_PER_PARAMETER * total_params(run.model)
    lack = Disk().free_space(folder).lack(folder, needed_bytes, count * (world_size(run.parallel) + 2))
    if lack is not None:
        raise MachineError(
            f"{lack} ({count} more checkpoint{'s' * (count > 1)} of {total_params(run.model):,} parameters). "
            "Free space there, or set runs_dir to a larger file system."
        )
