"""The arithmetic of a run: parameters, FLOPs, memory, and the checks of a layout. No torch; computed nowhere else."""

from megagrok.plan.batch import global_batch_at, num_micro_batches, stage_ranks, total_samples, world_size
from megagrok.plan.check import check, require_runnable, with_setting
from megagrok.plan.describe import Description, describe, describe_run
from megagrok.plan.flops import (
    CONVENTION,
    forward_flops_per_token,
    mfu,
    training_flops_per_token,
)
from megagrok.plan.memory import StateBytes, state_bytes
from megagrok.plan.params import active_params, params_by_part, total_params

__all__ = [
    "CONVENTION",
    "Description",
    "StateBytes",
    "active_params",
    "check",
    "describe",
    "describe_run",
    "forward_flops_per_token",
    "global_batch_at",
    "mfu",
    "num_micro_batches",
    "params_by_part",
    "require_runnable",
    "stage_ranks",
    "state_bytes",
    "total_params",
    "total_samples",
    "training_flops_per_token",
    "with_setting",
    "world_size",
]
