"""What every contender of the race is, and what several of them share."""

from typing import Protocol

import torch

from megagrok.data.batches import Batch
from megagrok.engine.engine import Engine
from megagrok.errors import NonFiniteError
from megagrok.model.parts import LocalParameter
from megagrok.parallel.groups import ProcessGroups


class Contender(Protocol):
    """One way to train. Making one and calling `step` are collective over all ranks."""

    name: str
    num_params: int
    """Parameters of the whole model."""

    def step(self, batch: Batch, lr: float) -> float:
        """Forward, backward, clip, update; returns the mean loss over the step's tokens, equal on all ranks.

        Raises NonFiniteError if the gradient is not finite.
        """
        ...


def engine_step(engine: Engine, batch: Batch, lr: float, name: str) -> float:
    """One step of an engine of ours. Raises NonFiniteError."""
    totals = engine.forward_backward(batch)
    if not engine.update(lr).is_applied:
        raise not_finite(name)
    return totals.ce_sum / totals.num_tokens


def not_finite(name: str) -> NonFiniteError:
    """The error of a step that did not happen."""
    return NonFiniteError(f"{name}: the gradient is not finite, so its step cannot be timed")


def count_parameters(parameters: list[LocalParameter], groups: ProcessGroups) -> int:
    """Parameters of the whole model, each counted on one of the ranks that hold it. Collective over all ranks."""
    place = groups.coordinates
    mine = 0
    for item in parameters:
        is_first_replica = place.expert_data == 0 if item.is_expert else place.data == place.context == 0
        if is_first_replica and not (item.is_replicated_over_tensor and place.tensor > 0):
            mine += item.parameter.numel()
    count = torch.tensor(mine)
    torch.distributed.all_reduce(count)
    return int(count)
