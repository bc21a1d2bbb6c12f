"""Checkpoints without a layout and without pickle: safetensors shards and one JSON commit.

A rank saves fragments, named pieces of global tensors; a rank of any other layout reads blocks. `save_checkpoint` is
all or nothing, an `AsyncSaver` does the same while the run goes on, `find_checkpoint` never returns a damaged one,
`Checkpoint.read` never returns a wrong byte.
The digests find rot and mix-ups; they do not prove who wrote the files.
"""

from megagrok.checkpoint.fence import Fence
from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.load import Checkpoint, find_checkpoint, list_steps, require_one_run
from megagrok.checkpoint.save import save_checkpoint, take_over
from megagrok.checkpoint.saver import AsyncSaver, Outcome
from megagrok.checkpoint.verify import verify_checkpoint

__all__ = [
    "AsyncSaver",
    "Checkpoint",
    "Fence",
    "Fragment",
    "Outcome",
    "find_checkpoint",
    "list_steps",
    "require_one_run",
    "save_checkpoint",
    "take_over",
    "verify_checkpoint",
]
