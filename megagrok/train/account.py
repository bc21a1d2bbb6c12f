"""This rank's account of the samples it was fed: the trainer's side of the data ledger.

Every rank has one, so that the trainer asks no questions; the one rank of each data coordinate that speaks for it
(tensor = context = pipeline = 0) writes. Nothing is exchanged but once, at the start.
"""

import logging

from megagrok.checkpoint import list_steps
from megagrok.checkpoint.commit import read_commit, step_name
from megagrok.config import RunConfig
from megagrok.data.audit import Audit, audit
from megagrok.data.batches import Batch, TrainBatches
from megagrok.data.ledger import (
    Action,
    Begin,
    DataChange,
    Ledger,
    Step,
    digest_documents,
    encode_samples,
    ledger_path,
    next_part,
)
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.topology import Coordinates
from megagrok.train.files import RunFiles
from megagrok.train.result import StepResult

# Not print: a log that cannot be written either must not end a step.
logger = logging.getLogger(__name__)


class Account:
    """Made once a start, by all ranks; `begin` before the first step and after each way back."""

    def __init__(
        self,
        run: RunConfig,
        files: RunFiles,
        data: TrainBatches,
        ranks: Ranks,
        place: Coordinates,
        generation: int,
    ) -> None:
        """generation: how often the run was started, this start included. Collective."""
        self._run, self._data, self._data_rank, self.generation = run, data, place.data, generation
        self._ledger: Ledger | None = None
        part = 0
        if place.tensor == place.context == place.pipeline == 0:
            self._ledger = Ledger(ledger_path(files.ledger, place.data), logger.warning)
            part = next_part(files.ledger, place.data, generation)
        self._part = max(int(str(other)) for other in ranks.gather(part))

    def begin(self, step: int) -> None:
        """Go on after `step`, at the data's present position."""
        if self._ledger is None:
            return
        self._ledger.write(
            Begin(
                generation=self.generation,
                part=self._part,
                data_rank=self._data_rank,
                data_size=self._run.parallel.data,
                step=step,
                consumed_samples=self._data.consumed_samples,
                samples_per_epoch=self._data.samples_per_epoch,
                fingerprint=self._data.fingerprint,
                left_out=self._data.left_out,
            )
        )

    def go_back(self, step: int) -> None:
        """The steps after `step` do not count any more; go on from there."""
        self._part += 1
        self.begin(step)

    def change_data(self, step: int, before: str) -> None:
        """Other data were accepted after `step`; before: fingerprint of those until then."""
        if self._ledger is not None:
            change = DataChange(
                generation=self.generation,
                part=self._part,
                data_rank=self._data_rank,
                step=step,
                before=before,
                after=self._data.fingerprint,
            )
            self._ledger.write(change)

    def write(self, step: int, batch: Batch, global_batch: int, action: Action) -> None:
        """A step is over; the line is in the kernel's hands when this returns, before anything is saved."""
        if self._ledger is None:
            return
        line = Step(
            generation=self.generation,
            part=self._part,
            data_rank=self._data_rank,
            data_size=self._run.parallel.data,
            micro_batch=self._run.train.micro_batch,
            global_batch=global_batch,
            step=step,
            samples=encode_samples(batch.sample_ids),
            documents=digest_documents(batch.document_ids),
            action=action,
        )
        self._ledger.write(line)

    def after_step(self, result: StepResult) -> None:
        """As a hook that comes before the one that saves."""
        if result.step % self._run.checkpoint.every_steps == 0 or result.step == self._run.train.steps:
            self.sync()

    def sync(self) -> None:
        """Put the lines on the disk, before a save that they account for."""
        if self._ledger is not None:
            self._ledger.sync()

    def close(self) -> None:
        """Put everything on the disk and let go of the file."""
        if self._ledger is not None:
            self._ledger.sync()
            self._ledger.close()


def audit_run(files: RunFiles) -> Audit:
    """What a run's ledger proves of its samples, held against the positions of its checkpoints. One process calls it.

    Raises DataError if there is no ledger.
    """
    steps = list_steps(files.checkpoints) if files.checkpoints.exists() else []
    saved = {}
    for step in steps:
        position = read_commit(files.checkpoints / step_name(step))[0].facts["data"]
        assert isinstance(position, dict)
        saved[step] = int(str(position["consumed_samples"]))
    return audit(files.ledger, saved)
