"""What watches the steps: records and held-out loss. (Checkpoints: saving.py.)"""

from collections.abc import Iterator

from megagrok.config import RunConfig
from megagrok.data.batches import Batch, held_out_batches
from megagrok.data.prepare import PreparedData
from megagrok.engine.engine import Engine
from megagrok.parallel.beats import Pulse
from megagrok.plan import training_flops_per_token
from megagrok.telemetry.expert_load import expert_shares
from megagrok.telemetry.metrics_file import MetricsFile
from megagrok.telemetry.progress import Progress
from megagrok.telemetry.records import EvaluationRecord, GuardRecord, Record, StepRecord, make_evaluation
from megagrok.telemetry.throughput import measure_throughput
from megagrok.telemetry.tracker import Tracker
from megagrok.train.result import StepResult


class Journal:
    """Where records go on the one rank that talks: metrics.jsonl, W&B, the progress bar."""

    def __init__(self, metrics: MetricsFile, tracker: Tracker, progress: Progress) -> None:
        self.metrics, self.tracker, self.progress = metrics, tracker, progress

    def write(self, record: Record) -> None:
        """Put one record everywhere."""
        self.metrics.write(record)
        self.tracker.log(record)
        match record:
            case StepRecord():
                self.progress.step(record)
            case EvaluationRecord():
                self.progress.evaluation(record)
            case GuardRecord():
                self.say(f"step {record.step}: {record.decision}, {record.reason}; step {record.next_step} is next")

    def say(self, text: str) -> None:
        """Show a line to whoever watches; it is in no record."""
        self.progress.say(text)

    def close(self) -> None:
        """Hand over what is left; also after an error."""
        self.progress.close()
        self.metrics.close()
        self.tracker.finish()


class Log:
    """A StepRecord every `telemetry.log_every_steps`, on the rank that has a journal."""

    def __init__(self, run: RunConfig, journal: Journal | None, peak_flops_per_second: float) -> None:
        self._run, self._journal, self._peak = run, journal, peak_flops_per_second
        self._flops_per_token = training_flops_per_token(run.model, run.train.seq_len)

    def after_step(self, result: StepResult) -> None:
        """Nothing is exchanged: totals are equal on all ranks already."""
        last = self._run.train.steps
        if self._journal is None or (result.step % self._run.telemetry.log_every_steps and result.step != last):
            return
        totals, num_layers = result.totals, self._run.model.num_layers
        speed = measure_throughput(
            tokens=totals.num_tokens,
            step_seconds=result.seconds,
            flops_per_token=self._flops_per_token,
            peak_flops_per_second=self._peak,
        )
        self._journal.write(
            StepRecord(
                step=result.step,
                loss=totals.ce_sum / totals.num_tokens,
                balance_loss=totals.balance_sum / totals.num_tokens / num_layers,
                z_loss=totals.z_sum / totals.num_tokens / num_layers,
                grad_norm=result.update.grad_norm,
                clip_coefficient=result.update.clip_coefficient,
                lr=result.lr,
                tokens=totals.num_tokens,
                consumed_samples=result.consumed_samples,
                global_batch=result.global_batch,
                step_seconds=result.seconds,
                tokens_per_second=speed.tokens_per_second,
                mfu=speed.mfu,
                expert_load=expert_shares(totals.tokens_per_expert_LE.tolist()),
            )
        )


class Evaluate:
    """Held-out loss every `train.evaluate_every_steps` and at the end; the same samples each time."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        prepared: PreparedData,
        journal: Journal | None,
        data_rank: int,
        pulse: Pulse,
    ) -> None:
        self._run, self._engine, self._prepared = run, engine, prepared
        self._journal, self._data_rank, self._pulse = journal, data_rank, pulse

    def after_step(self, result: StepResult) -> None:
        """Collective in the steps where it evaluates."""
        if result.step % self._run.train.evaluate_every_steps == 0 or result.step == self._run.train.steps:
            self.evaluate(result.step)

    def evaluate(self, step: int) -> None:
        """Evaluate the weights as they are after `step` updates. Collective."""
        ce_sum, num_tokens = 0.0, 0
        with self._pulse.during("evaluate", step):
            for batch in self._batches():
                batch_sum, batch_tokens = self._engine.evaluate(batch)
                ce_sum, num_tokens = ce_sum + batch_sum, num_tokens + batch_tokens
                self._pulse.beat()
        if self._journal is not None:
            self._journal.write(make_evaluation(step=step, loss=ce_sum / num_tokens, tokens=num_tokens))

    def _batches(self) -> Iterator[Batch]:
        train, parallel = self._run.train, self._run.parallel
        return held_out_batches(
            self._prepared,
            seq_len=train.seq_len,
            num_samples=train.evaluate_samples,
            global_batch=train.evaluate_samples,
            micro_batch=train.micro_batch,
            data_rank=self._data_rank,
            data_size=parallel.data,
        )
