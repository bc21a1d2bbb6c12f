"""The training step and the loop around it, on one rank. Knows no Megatron, no DeepSpeed, no layout."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megagrok.config import RunConfig
from megagrok.data.batches import Batch, TrainBatches
from megagrok.engine.engine import Engine, StepTotals, Update
from megagrok.errors import NonFiniteError
from megagrok.parallel.beats import Pulse
from megagrok.parallel.ranks import JSON, Ranks
from megagrok.plan import global_batch_at
from megagrok.platform import Platform
from megagrok.train.account import Account
from megagrok.train.beginning import Inject
from megagrok.train.files import RunFiles
from megagrok.train.schedule import learning_rate
from megagrok.train.stop import StopRequest

"""What a drill does to a step, between its backward pass and the reduction of its gradients."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer update, as the hooks see it; equal on all ranks."""

    step: int
    totals: StepTotals
    update: Update
    lr: float
    global_batch: int
    consumed_samples: int
    seconds: float


class Hook(Protocol):
    """Something that watches steps. It may talk to other ranks, so every rank calls every hook; it changes no step."""

    def after_step(self, result: StepResult) -> None:
        """Called by all ranks after each update, in the same order."""


class Trainer:
    """Engine, data and hooks of one rank."""

    def __init__(
        self,
        run: RunConfig,
        files: RunFiles,
        engine: Engine,
        data: TrainBatches,
        account: Account,
        hooks: Sequence[Hook],
        ranks: Ranks,
        platform: Platform,
        pulse: Pulse,
        inject: "Inject | None" = None,
    ) -> None:
        """inject: called with the step by every rank; for drills, it may spoil gradients and weights."""
        self._run, self._files, self._engine, self._data, self._account = run, files, engine, data, account
        self._hooks, self._ranks, self._platform, self._inject = hooks, ranks, platform, inject
        self._pulse = pulse

    def train(self, done_steps: int, stop: StopRequest) -> int:
        """Run the steps after `done_steps` to the end of the run, or to the first step after a stop was asked for.

        Collective. Returns the last step. Raises NonFiniteError before weights move; see `train_step`.
        """
        for step in range(done_steps + 1, self._run.train.steps + 1):
            result = self.train_step(step)
            for hook in self._hooks:
                hook.after_step(result)
            if step < self._run.train.steps and self._ranks.any(stop.is_raised):
                return step
        return max(done_steps, self._run.train.steps)

    def train_step(self, step: int) -> StepResult:
        """One optimizer update. Order matters and is the documentation."""
        started = time.perf_counter()
        self._pulse.enter("step", step)
        global_batch = global_batch_at(self._run.train, self._data.next_sample)
        batch = self._data.next_batch(global_batch)  # CPU; carries document ids, so a bad step can be looked into
        totals = self._engine.forward_backward(batch)  # sums over tokens, equal on all ranks
        if self._inject is not None:
            self._inject(step, self._engine)
        lr = self._learning_rate(step)
        update = self._engine.update(lr)  # reduce, check, clip, step
        if not update.is_applied:
            self._refuse(step, totals, batch)  # raises on every rank together; weights have not moved
        self._account.write(step, batch, global_batch, "trained")
        self._platform.wait()
        self._pulse.step_done()
        seconds = time.perf_counter() - started
        return StepResult(step, totals, update, lr, global_batch, self._data.consumed_samples, seconds)

    def _learning_rate(self, step: int) -> float:
        run = self._run
        return learning_rate(step, peak=run.optimizer.lr, schedule=run.schedule, total_steps=run.train.steps)

    def _refuse(self, step: int, totals: StepTotals, batch: Batch) -> None:
        """Write down what the ranks were fed, then stop them all."""
        mine: JSON = {"sample_ids": list(batch.sample_ids), "document_ids": [list(ids) for ids in batch.document_ids]}
        everyone = self._ranks.gather(mine)
        path = self._files.bad_step(step)
        if self._ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, "ranks": everyone}), encoding="utf-8")
        loss = totals.ce_sum / totals.num_tokens
        raise NonFiniteError(
            f"the gradient of step {step} is not finite (loss {loss:g}). Weights were not updated. "
            f"Samples and documents of the step are in {path}. Lower optimizer.lr, or look at those documents."
        )
