"""The training step and the loop around it, on one rank. Knows no Megatron, no DeepSpeed, no layout."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megagrok.config import RunConfig
from megagrok.data.batches import TrainBatches
from megagrok.engine.engine import Engine, StepTotals, Update
from megagrok.parallel.beats import Pulse
from megagrok.parallel.ranks import Ranks
from megagrok.plan import global_batch_at
from megagrok.platform import Platform
from megagrok.train.account import Account
from megagrok.train.beginning import Inject
from megagrok.train.guard import Guard, Verdict
from megagrok.train.refusal import Refusals, Refused
from megagrok.train.result import StepResult, WayBack
from megagrok.train.schedule import learning_rate
from megagrok.train.soundness import Soundness
from megagrok.train.stop import StopRequest


class Hook(Protocol):
    """Something that watches steps. It may talk to other ranks, so every rank calls every hook; it changes no step."""

    def after_step(self, result: StepResult) -> None:
        """Called by all ranks after each update, in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Engine, data, guard and hooks of one rank."""

    run: RunConfig
    engine: Engine
    data: TrainBatches
    guard: Guard
    soundness: Soundness
    refusals: Refusals
    account: Account
    hooks: Sequence[Hook]
    ranks: Ranks
    platform: Platform
    pulse: Pulse
    inject: "Inject | None"
    """Called with the step by every rank; for drills, it may spoil gradients and weights."""

    def train(self, done_steps: int, stop: StopRequest) -> int:
        """Run the steps after `done_steps` to the end of the run, or to the first step after a stop was asked for.

        Collective. Returns the last step. Raises NonFiniteError or SpikeError before weights move; see `train_step`.
        """
        done = done_steps
        while done < self.run.train.steps:
            result = self.train_step(done + 1)
            if isinstance(result, StepResult):
                for hook in self.hooks:
                    hook.after_step(result)
            done = result.step
            if done < self.run.train.steps and self.ranks.any(stop.is_raised):
                break
        return done

    def train_step(self, step: int) -> StepResult | WayBack:
        """One optimizer update. Order matters and is the documentation."""
        started = time.perf_counter()
        self.pulse.enter("step", step)
        first_sample = self.data.next_sample
        global_batch = global_batch_at(self.run.train, first_sample)
        batch = self.data.next_batch(global_batch)  # CPU; carries document ids, so a bad step can be looked into
        totals = self.engine.forward_backward(batch)  # sums over tokens, equal on all ranks
        if self.inject is not None:
            self.inject(step, self.engine)
        self.soundness.before_update(step)
        lr = self._learning_rate(step)
        update, verdict = self._update(step, totals, lr)  # reduce, judge, clip, step; or nothing moves, on any rank
        if verdict is None:
            self.account.write(step, batch, global_batch, "trained")
        else:
            refused = Refused(
                step=step,
                verdict=verdict,
                batch=batch,
                global_batch=global_batch,
                first_sample=first_sample,
                end_sample=self.data.consumed_samples,
            )
            done = self.refusals.carry_out(refused)  # raises on every rank together if the run is to stop
            if done < step:
                return WayBack(done)
        self.platform.wait()
        self.pulse.step_done()
        seconds = time.perf_counter() - started
        return StepResult(step, totals, update, lr, global_batch, self.data.consumed_samples, seconds)

    def _update(self, step: int, totals: StepTotals, lr: float) -> tuple[Update, Verdict | None]:
        """Learn from the step, unless the guard or the engine refuses it; equal on all ranks."""
        loss = totals.ce_sum / totals.num_tokens
        self.engine.reduce_gradients()
        grad_norm = self.engine.gradient_norm() if self.guard.needs_norm else None
        verdict = self.guard.judge(step, loss, grad_norm)
        if verdict is not None:
            return self.engine.drop_gradients(), verdict
        update = self.engine.step(lr)
        if not update.is_applied:
            return update, self.guard.refuse(step, f"the gradient is not finite (loss {loss:g})", loss, None)
        self.guard.accept(step, loss, update.grad_norm)
        return update, None

    def _learning_rate(self, step: int) -> float:
        run = self.run
        return learning_rate(step, peak=run.optimizer.lr, schedule=run.schedule, total_steps=run.train.steps)
