"""When a run saves, and what a save that fails means to it: training goes on, until too many have failed in a row.

The bytes are the business of checkpoint/. The one idea: all ranks learn of an outcome after the same step, so what
follows from it (a line for the reader, or the end of the run) needs no further word between them.
"""

from collections.abc import Callable, Mapping

from megagrok.checkpoint import AsyncSaver, Outcome
from megagrok.config import RunConfig
from megagrok.engine.engine import Engine
from megagrok.errors import MachineError
from megagrok.parallel.beats import Pulse
from megagrok.parallel.ranks import JSON, Ranks
from megagrok.train.result import StepResult

MAX_FAILURES = 3
"""Saves that may fail in a row before the run ends: what it does would be lost."""
# A wait that a reader should know of: the disk is slower than the saves come.
_NOTABLE_SECONDS = 0.1


class Save:
    """A checkpoint every `checkpoint.every_steps` and at the end, written in the background."""

    def __init__(
        self,
        run: RunConfig,
        saver: AsyncSaver,
        engine: Engine,
        facts: Callable[[], Mapping[str, JSON]],
        ranks: Ranks,
        pulse: Pulse,
        say: Callable[[str], None],
        last_saved: int | None,
    ) -> None:
        """facts: what a checkpoint holds beside tensors, as of the call.  say: shows a line to whoever watches.
        last_saved: the step of the checkpoint that the run goes on from, if it does."""
        self._run, self._saver, self._engine, self._facts = run, saver, engine, facts
        self._ranks, self._pulse, self._say = ranks, pulse, say
        self._last_saved, self._last_begun, self._failures = last_saved, last_saved, 0

    def after_step(self, result: StepResult) -> None:
        """Collective while a write is under way, and in the steps where it saves."""
        if self._saver.is_writing and self._ranks.any(self._saver.has_outcome):
            self.settle()
        if result.step % self._run.checkpoint.every_steps == 0 or result.step == self._run.train.steps:
            self.begin(result.step)

    def begin(self, step: int) -> None:
        """Start to save the state after `step` updates; waits for the copy, and for the save before if that is slow.

        Collective. Raises MachineError on all ranks if the save before was one failure too many.
        """
        self.settle()
        if self._last_saved is not None and self._last_saved >= step:
            # The run went back: what it saved then will be set aside.
            self._last_saved = None
        with self._pulse.during("save", step):
            self._saver.save(step, self._engine.state_fragments(), self._facts())
        self._last_begun = step

    def ensure(self, step: int) -> None:
        """Return once the state after `step` updates, which is the present one, is saved; for the end of the run.

        Collective. Tries as often as saves may fail in a row, then raises MachineError on all ranks.
        """
        if self._last_begun == step:
            self.settle()
        while self._last_saved != step:
            self.begin(step)
            self.settle()

    def go_back(self, step: int) -> None:
        """The run goes on after `step`, whose checkpoint it has taken over again."""
        self._last_saved = self._last_begun = step

    def settle(self) -> None:
        """Take the outcome of the write that is under way, if one is. Collective."""
        with self._pulse.during("save", self._last_begun or 0):
            outcome = self._saver.finish()
        if outcome is None:
            return
        if outcome.is_in_place:
            self._last_saved, self._failures = outcome.step, 0
            self._pulse.saved(outcome.step, outcome.held_seconds + outcome.write_seconds)
            self._say(_success(outcome))
            return
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            newest = (
                "There is no checkpoint" if self._last_saved is None else f"The newest is of step {self._last_saved}"
            )
            raise MachineError(
                f"{self._failures} saves in a row failed, the last with: {outcome.error}\n"
                f"{newest}. Free space or repair the file system, then resume."
            )
        self._say(
            f"step {outcome.step} was NOT saved: {outcome.error}. Older checkpoints are as they were. "
            f"Training goes on; {MAX_FAILURES} failures in a row end it, this is number {self._failures}."
        )


def _success(outcome: Outcome) -> str:
    text = (
        f"step {outcome.step} saved: held {outcome.held_seconds:.2f} s, written in {outcome.write_seconds:.2f} s, "
        f"{outcome.gigabytes_per_second:.2f} GB/s"
    )
    if outcome.waited_seconds > _NOTABLE_SECONDS:
        text += f"; the run waited {outcome.waited_seconds:.2f} s for it"
    return text if outcome.error is None else f"{text}. {outcome.error}"
