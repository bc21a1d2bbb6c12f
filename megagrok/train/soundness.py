"""Whether a rank's state may be trusted: finite before it is saved, and the same wherever it is held twice."""

from megagrok.config import RunConfig
from megagrok.engine.engine import Engine
from megagrok.engine.replicas import check_replicas
from megagrok.errors import NonFiniteError
from megagrok.parallel.ranks import JSON, Ranks
from megagrok.parallel.topology import Topology
from megagrok.train.result import StepResult


class Soundness:
    """The checks of one rank. Collective: every rank calls them for the same steps."""

    def __init__(self, run: RunConfig, engine: Engine, ranks: Ranks) -> None:
        self._run, self._engine, self._ranks, self._topology = run, engine, ranks, Topology.of(run.parallel)
        self._every_steps = run.guard.replica_check_every_steps

    def before_update(self, step: int) -> None:
        """Every guard.replica_check_every_steps, before the gradients are reduced: under ZeRO an update would write
        over a weight that has changed. Raises ReplicaError on all ranks."""
        if self._every_steps and step % self._every_steps == 0:
            self._check_replicas(step)

    def after_step(self, result: StepResult) -> None:
        """As a hook that comes before the one that saves."""
        if result.step % self._run.checkpoint.every_steps == 0 or result.step == self._run.train.steps:
            self.before_save(result.step)

    def before_save(self, step: int) -> None:
        """Raises NonFiniteError on all ranks if a weight or a moment of any is not finite, else as `before_update`."""
        mine: JSON = self._engine.find_bad_state()
        found = [f"{name} on rank {rank}" for rank, name in enumerate(self._ranks.gather(mine)) if name is not None]
        if found:
            raise NonFiniteError(
                f"the state after step {step} is not finite and is not saved: {'; '.join(found[:4])}"
                + (f"; and {len(found) - 4} more" if found[4:] else "")
                + ". Every gradient was finite: lower optimizer.lr, or suspect a machine. Older checkpoints are sound."
            )
        if self._every_steps:
            self._check_replicas(step)

    def _check_replicas(self, step: int) -> None:
        check_replicas(self._engine.replicated(), self._topology, self._ranks, step=step)
