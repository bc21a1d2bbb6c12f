"""Contender: the training step that `megagrok train` takes."""

from megagrok.bench.peers.contender import engine_step
from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.engine import build_engine
from megagrok.parallel.groups import ProcessGroups
from megagrok.plan import total_params
from megagrok.platform import Platform


class MegagrokStep:
    """The engine as it is."""

    name = "megagrok"

    def __init__(self, run: RunConfig, groups: ProcessGroups, platform: Platform) -> None:
        self.num_params = total_params(run.model)
        self._engine = build_engine(run, groups, platform)

    def step(self, batch: Batch, lr: float) -> float:
        """See Contender."""
        return engine_step(self._engine, batch, lr, self.name)
