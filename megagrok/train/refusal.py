"""What follows from a guard's verdict: the batch is written down, everyone is told, and the run stops, goes on or back.

    stop     NonFiniteError or SpikeError on all ranks
    skip     the step counts, its samples are consumed, nothing moves
    rewind   engine, data and guard as in the newest checkpoint; the bad step's samples are passed over when they come
             up again. From there on it is the run that never had those samples, bit by bit.

The way back is in bad/STEP.json as well as in the next checkpoint, so that a restart before that one leaves the same
samples out.
"""

import json
import logging
from dataclasses import dataclass
from typing import Protocol

from megagrok.checkpoint import Checkpoint, find_checkpoint
from megagrok.data.batches import Batch, TrainBatches
from megagrok.data.ledger import Action
from megagrok.engine.engine import Engine
from megagrok.errors import NonFiniteError, SpikeError
from megagrok.parallel.ranks import JSON, Ranks
from megagrok.telemetry.records import GuardRecord, to_json_number
from megagrok.train.account import Account
from megagrok.train.files import RunFiles
from megagrok.train.guard import Guard, Verdict
from megagrok.whole_file import write_whole

logger = logging.getLogger(__name__)

_ACTIONS: dict[str, Action] = {"stop": "refused", "skip": "skipped", "rewind": "rewound"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A step that is not learnt from."""

    step: int
    verdict: Verdict
    batch: Batch
    global_batch: int
    first_sample: int
    """Of the whole step."""
    end_sample: int
    """Behind its last one."""


class Told(Protocol):
    """Those who count steps beside the trainer, on every rank."""

    def settle(self) -> None:
        """Wait until no save is under way. Collective."""

    def record(self, record: GuardRecord) -> None:
        """Write down, on the rank that talks, what a guard decided."""

    def go_back(self, step: int) -> None:
        """The run goes on after `step`."""


class Refusals:
    """Carries verdicts out. Every rank has one and calls it for the same steps."""

    def __init__(
        self,
        files: RunFiles,
        run_id: str,
        engine: Engine,
        data: TrainBatches,
        guard: Guard,
        account: Account,
        ranks: Ranks,
        told: Told,
    ) -> None:
        self._files, self._run_id, self._engine, self._data = files, run_id, engine, data
        self._guard, self._account, self._ranks = guard, account, ranks
        self._told = told

    def carry_out(self, refused: Refused) -> int:
        """The last step that counts from now on: the refused one, or that of the checkpoint that was gone back to.

        Collective. Raises NonFiniteError or SpikeError on all ranks if the run is to stop.
        """
        verdict, decision = refused.verdict, refused.verdict.decision
        checkpoint: Checkpoint | None = None
        if decision == "rewind":
            self._told.settle()
            checkpoint = find_checkpoint(self._files.checkpoints, ranks=self._ranks)
            if checkpoint is None:
                decision = "skip"  # there is nothing to go back to yet; the record says so
        done = refused.step if checkpoint is None else checkpoint.step
        if decision == "stop":
            done = refused.step - 1
        self._write_down(refused, decision, done)
        self._told.record(
            GuardRecord(
                step=refused.step,
                generation=self._account.generation,
                decision=decision,
                reason=verdict.reason,
                loss=verdict.loss,
                grad_norm=verdict.grad_norm,
                next_step=done + 1,
            )
        )
        self._account.write(refused.step, refused.batch, refused.global_batch, _ACTIONS[decision])
        if decision == "stop":
            raise self._stop(refused)
        if checkpoint is not None:
            self._go_back(checkpoint, (refused.first_sample, refused.end_sample))
        return done

    def _go_back(self, checkpoint: Checkpoint, bad: tuple[int, int]) -> None:
        left_out = self._data.left_out
        self._engine.load(checkpoint)
        self._data.load_state(checkpoint.facts["data"])  # type: ignore[arg-type]  # load_state checks what it is given
        self._data.leave_out([*left_out, bad])
        self._guard.load_window(checkpoint.facts.get("guard"))
        self._told.go_back(checkpoint.step)
        self._account.go_back(checkpoint.step)

    def _write_down(self, refused: Refused, decision: str, done: int) -> None:
        """bad/STEP.json, whole or not at all; a disk that refuses costs the file and not the run."""
        batch, verdict = refused.batch, refused.verdict
        mine: JSON = {"sample_ids": list(batch.sample_ids), "document_ids": [list(ids) for ids in batch.document_ids]}
        everyone = self._ranks.gather(mine)
        if self._ranks.rank != 0:
            return
        left_out = {*self._data.left_out}
        if decision == "rewind":
            left_out.add((refused.first_sample, refused.end_sample))
        page: JSON = {
            "run_id": self._run_id,
            "step": refused.step,
            "generation": self._account.generation,
            "reason": verdict.reason,
            "decision": decision,
            "next_step": done + 1,
            # All of the run so far: a step that is refused again has one page.
            "left_out": [list(range_) for range_ in sorted(left_out)],
            "loss": to_json_number(verdict.loss),
            "grad_norm": to_json_number(verdict.grad_norm),
            "window_mean": verdict.mean,
            "window_std": verdict.std,
            "global_batch": refused.global_batch,
            "ranks": everyone,
        }
        path = self._files.bad_step(refused.step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(page), sync=True)
        except OSError as error:
            # Not print: a log that cannot be written either must not end the run.
            logger.warning("%s cannot be written (%s); the run goes on without it", path, error)

    def _stop(self, refused: Refused) -> NonFiniteError | SpikeError:
        kind = SpikeError if refused.verdict.is_spike else NonFiniteError
        return kind(
            f"step {refused.step} is not learnt from: {refused.verdict.reason}. Weights were not updated. Samples and "
            f"documents of the step are in {self._files.bad_step(refused.step)}; make it again with: "
            f"megagrok replay {self._files.root} {refused.step}. Lower optimizer.lr, look at those documents, or set "
            f"guard.{'on_spike' if refused.verdict.is_spike else 'on_nonfinite'}=skip or rewind."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """What a page of bad/ says that is needed again."""

    run_id: str
    step: int
    left_out: tuple[tuple[int, int], ...]
    """Samples [from, to) that rewinds had left out of the run by then, with this step."""
    first_sample: int
    """Of the step."""
    loss: float
    grad_norm: float


def read_bad_step(files: RunFiles, step: int) -> BadStep | None:
    """The page of a step; None if no guard refused it, or the page cannot be read."""
    try:
        page = json.loads(files.bad_step(step).read_bytes())
        return BadStep(
            run_id=str(page["run_id"]),
            step=int(page["step"]),
            left_out=tuple((int(low), int(high)) for low, high in page["left_out"]),
            first_sample=min(int(sample) for rank in page["ranks"] for sample in rank["sample_ids"]),
            loss=float(page["loss"]),
            grad_norm=float(page["grad_norm"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_bad_steps(files: RunFiles) -> list[BadStep]:
    """All pages that can be read, by step."""
    steps = sorted(int(path.stem) for path in files.bad_step(0).parent.glob("*.json") if path.stem.isdecimal())
    return [page for step in steps if (page := read_bad_step(files, step)) is not None]


def left_out_on_record(files: RunFiles, run_id: str, consumed_samples: int, ranks: Ranks) -> list[tuple[int, int]]:
    """Samples that rewinds of this run have left out at or after a position; for a run that goes on from there.

    Collective: rank 0 reads. A page that cannot be read is passed over: its step comes again, and is judged again.
    """
    found: JSON = [
        list(range_)
        for page in (read_bad_steps(files) if ranks.rank == 0 else [])
        if page.run_id == run_id
        for range_ in page.left_out
        if range_[0] >= consumed_samples
    ]
    agreed = ranks.gather(found)[0]
    assert isinstance(agreed, list)
    return [(int(str(low)), int(str(high))) for low, high in agreed]
