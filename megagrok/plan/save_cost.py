"""What it costs to write and to read a checkpoint at any size: bytes over rates that were measured on a small one.

A save holds the step while the state is copied to host memory, and is written behind the steps that follow; a failure
before it is in place loses it. Rates are per rank, as measured; what all ranks write and read together is held against
the fastest file system that a training run has told of, because no cluster's storage grows with its ranks for ever.
"""

from dataclasses import dataclass

from megagrok.config.schema import RunConfig
from megagrok.plan.memory import MASTER_BYTES, MOMENT_BYTES, stage_params, state_bytes
from megagrok.plan.params import total_params

HOLD_BYTES_PER_SECOND = 7.79e9
"""Of a rank's copy to host memory. docs/bench/checkpoint.json: 0.53 GB a rank in 0.068 s, memory to memory."""
WRITE_BYTES_PER_SECOND = 1.18e9
"""Of a rank's hashing, writing and syncing after that. docs/bench/checkpoint.json: two ranks on one disk."""
READ_BYTES_PER_SECOND = WRITE_BYTES_PER_SECOND
"""An assumption: reading has not been measured. It hashes every byte as writing does."""
STORAGE_BYTES_PER_SECOND = 2e12
"""Of all ranks together: the sustained rate of the storage that Llama 3 405B was trained from, arXiv:2407.21783 sec.
3.3.1, the fastest that a run has told of."""
_ELEMENT_BYTES = MASTER_BYTES + MOMENT_BYTES


@dataclass(frozen=True, slots=True)
class SaveCost:
    """One checkpoint of a run, in seconds."""

    total_bytes: int
    hold_seconds: float
    """The step waits."""
    write_seconds: float
    """From then until the checkpoint counts."""
    load_seconds: float
    """Every rank reads its weights, and its share of the optimizer."""


def save_cost(run: RunConfig, hold_seconds: float | None = None) -> SaveCost:
    """Of a run in the layout that it has. hold_seconds: measured elsewhere, instead of ours."""
    stages = [stage_params(run.model, run.parallel, stage) for stage in range(run.parallel.pipeline)]
    held = max(stage.dense + stage.expert for stage in stages)
    # Without ZeRO one rank of each group of copies writes for all of them.
    own = held * _ELEMENT_BYTES
    if run.parallel.zero:
        own = max(size.optimizer for size in state_bytes(run.model, run.parallel, run.train.precision))
    parallel = run.parallel
    ranks = parallel.tensor * parallel.context * parallel.pipeline * parallel.data
    total = total_params(run.model) * _ELEMENT_BYTES
    # Weights lie in the checkpoint once, in fp32; all replicas read them. Without ZeRO they read the moments, too.
    read = held * MASTER_BYTES + own
    return SaveCost(
        total_bytes=total,
        hold_seconds=own / HOLD_BYTES_PER_SECOND if hold_seconds is None else hold_seconds,
        write_seconds=max(own / WRITE_BYTES_PER_SECOND, total / STORAGE_BYTES_PER_SECOND),
        load_seconds=max(read / READ_BYTES_PER_SECOND, read * ranks / STORAGE_BYTES_PER_SECOND),
    )
