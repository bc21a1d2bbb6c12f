"""Synthetic batches: uniform random tokens, the same for every layout and every contender."""

import torch

from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.parallel.groups import ProcessGroups


def random_batch(run: RunConfig, groups: ProcessGroups, step: int) -> Batch:
    """This data rank's part of a global batch that depends on `step` alone."""
    train, topology = run.train, groups.topology
    stream = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, run.model.vocab_size, (train.global_batch, train.seq_len + 1), generator=stream)
    mine = tokens.view(-1, topology.data, train.micro_batch, train.seq_len + 1)[:, groups.coordinates.data]
    num_samples = mine.shape[0] * mine.shape[1]
    return Batch(
        tokens_MBS=mine[..., :-1].contiguous(),
        labels_MBS=mine[..., 1:].contiguous(),
        sample_ids=tuple(range(num_samples)),
        document_ids=(),
    )
