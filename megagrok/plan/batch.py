"""Ranks, micro-batches and samples of a run. The counts that a layout and a batch-size ramp imply, one formula each."""

from megagrok.config.schema import ParallelConfig, RunConfig, TrainConfig


def world_size(parallel: ParallelConfig) -> int:
    """Ranks of the run; experts share out ranks that are already counted."""
    return parallel.tensor * parallel.context * parallel.pipeline * parallel.data


def stage_ranks(parallel: ParallelConfig) -> int:
    """Ranks of one pipeline stage, over which the experts are shared out."""
    return parallel.tensor * parallel.context * parallel.data


def samples_per_micro_step(config: RunConfig) -> int:
    """Samples that all replicas take in one micro-batch; every global batch is a multiple of it."""
    return config.train.micro_batch * config.parallel.data


def num_micro_batches(config: RunConfig, global_batch: int) -> int:
    """Micro-batches that each replica takes for one optimizer step."""
    return global_batch // samples_per_micro_step(config)


def global_batch_at(train: TrainConfig, consumed_samples: int) -> int:
    """Samples of the next optimizer step when `consumed_samples` are behind."""
    for stage in train.batch_ramp:
        if consumed_samples < stage.until_samples:
            return stage.global_batch
    return train.global_batch


def total_samples(train: TrainConfig) -> int:
    """Samples that the whole run consumes, ramp included."""
    consumed, steps_left = 0, train.steps
    for stage in train.batch_ramp:
        steps = min(steps_left, max(0, -(-(stage.until_samples - consumed) // stage.global_batch)))
        consumed += steps * stage.global_batch
        steps_left -= steps
    return consumed + steps_left * train.global_batch
