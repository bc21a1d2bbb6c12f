"""One rank of a training run, from its process group to its last step. Imports Megatron and DeepSpeed."""

import sys
import uuid
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megagrok.checkpoint import AsyncSaver, Checkpoint, find_checkpoint, take_over
from megagrok.config import RunConfig, to_dict
from megagrok.data.batches import TrainBatches
from megagrok.data.prepare import PreparedData
from megagrok.engine.engine import Engine, build_engine
from megagrok.parallel.groups import make_groups
from megagrok.parallel.ranks import JSON, ProcessGroupRanks, Ranks
from megagrok.parallel.topology import Topology
from megagrok.parallel.watch import frame_waits
from megagrok.platform import Platform, peak_flops_per_second
from megagrok.telemetry.metrics_file import open_metrics
from megagrok.telemetry.progress import Progress
from megagrok.telemetry.records import GuardRecord
from megagrok.telemetry.tracker import make_tracker
from megagrok.train.account import Account
from megagrok.train.beginning import Start, on_rank_0
from megagrok.train.files import RunFiles
from megagrok.train.guard import Guard
from megagrok.train.hooks import Evaluate, Journal, Log
from megagrok.train.refusal import Refusals, left_out_on_record
from megagrok.train.saving import Save
from megagrok.train.soundness import Soundness
from megagrok.train.stop import Preempted, listen_for_stop
from megagrok.train.trainer import Hook, Trainer

# What a write that is under way gets when the run ends by an error.
_GRACE_SECONDS = 60.0


def train_rank(
    ranks: ProcessGroupRanks,
    run: RunConfig,
    files: RunFiles,
    prepared: PreparedData,
    start: Start,
) -> None:
    """Build, load, train, save. Every rank of the job calls it once, with its process group formed.

    Raises Preempted (exit status 76) after a stop was asked for and saved; else whatever ended the run.
    """
    platform = Platform(ranks.device, dist.get_backend())
    pulse = start.beats.pulse(ranks.rank)
    pulse.enter("start", 0)
    with listen_for_stop() as stop, pulse.metered(frame_waits):
        groups = make_groups(
            Topology.of(run.parallel),
            virtual_pipeline=run.parallel.virtual_pipeline,
            platform=platform,
            timeout_seconds=start.timeout_seconds,
        )
        engine = build_engine(run, groups, platform)
        data_rank = groups.coordinates.data
        data = TrainBatches.of(run, prepared, data_rank)
        pulse.enter("load", 0)
        on_rank_0(ranks, lambda: take_over(files.checkpoints, start.fence))
        checkpoint = find_checkpoint(files.checkpoints, ranks=ranks)
        data_before: str | None = None
        run_id = _run_id(checkpoint, ranks)
        guard = Guard(run.guard)
        if checkpoint is not None:
            engine.load(checkpoint)
            data_before = data.load_state(checkpoint.facts["data"], accept_change=start.request.accept_data_change)  # type: ignore[arg-type]  # load_state checks what it is given
            data.leave_out(left_out_on_record(files, run_id, data.consumed_samples, ranks))
            guard.load_state(checkpoint.facts.get("guard"))
            pulse.saved(checkpoint.step)
        done = 0 if checkpoint is None else checkpoint.step
        account = Account(run, files, data, ranks, groups.coordinates, start.generation)
        account.begin(done)
        if data_before is not None:
            account.change_data(done, data_before)
        saver = _make_saver(run, files, start)
        journal = _open_journal(run, files, checkpoint) if ranks.rank == 0 else None
        try:
            facts = partial(_facts, run, run_id, engine, data, guard, start.generation)
            say = (lambda text: None) if journal is None else journal.say
            save = Save(run, saver, engine, facts, ranks, pulse, say, None if checkpoint is None else done)
            evaluate = Evaluate(run, engine, prepared, journal, data_rank, pulse)
            log = Log(run, journal, _peak_of_all_ranks(run, platform))
            if done == 0:
                evaluate.evaluate(0)
            soundness = Soundness(run, engine, ranks)
            told = _Told(journal, save)
            refusals = Refusals(files, run_id, engine, data, guard, account, ranks, told)
            hooks: list[Hook] = [log, evaluate, soundness, account, save]
            trainer = Trainer(
                run=run,
                engine=engine,
                data=data,
                guard=guard,
                soundness=soundness,
                refusals=refusals,
                account=account,
                hooks=hooks,
                ranks=ranks,
                platform=platform,
                pulse=pulse,
                inject=start.request.inject,
            )
            last = trainer.train(done, stop)
            if last < run.train.steps:
                soundness.before_save(last)
            account.sync()
            save.ensure(last)
            if last < run.train.steps:
                if ranks.rank == 0:
                    print(f"stopped; step {last} is saved. Go on with: {files.resume_command()}", file=sys.stderr)
                raise Preempted()
        finally:
            # After an error: what is nearly saved is worth a moment.
            saver.abandon(_GRACE_SECONDS)
            if journal is not None:
                journal.close()
            account.close()


@dataclass(frozen=True, slots=True)
class _Told:
    """Those who count steps beside the trainer, when a step is refused."""

    journal: Journal | None
    save: Save

    def settle(self) -> None:
        self.save.settle()

    def record(self, record: GuardRecord) -> None:
        if self.journal is not None:
            self.journal.write(record)

    def go_back(self, step: int) -> None:
        self.save.go_back(step)
        if self.journal is not None:
            self.journal.metrics.go_back(step)


def _run_id(checkpoint: Checkpoint | None, ranks: Ranks) -> str:
    """The name that all checkpoints of a run carry; a resumed run keeps it. Collective for a new run."""
    return str(ranks.gather(uuid.uuid4().hex)[0]) if checkpoint is None else str(checkpoint.facts["run_id"])


def _facts(
    run: RunConfig, run_id: str, engine: Engine, data: TrainBatches, guard: Guard, generation: int
) -> dict[str, JSON]:
    """What a checkpoint holds beside tensors."""
    return {
        "run_id": run_id,
        "generation": generation,
        "config": to_dict(run),
        "data": data.state_dict(),
        "guard": guard.state_dict(),
        "updates": engine.num_updates,
        "torch": torch.__version__,
    }


def _make_saver(run: RunConfig, files: RunFiles, start: Start) -> AsyncSaver:
    """The writer of this rank, with a process group that the run does not use. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=start.timeout_seconds))
    return AsyncSaver(files.checkpoints, ranks=ProcessGroupRanks(group), keep=run.checkpoint.keep, fence=start.fence)


def _open_journal(run: RunConfig, files: RunFiles, checkpoint: Checkpoint | None) -> Journal:
    done = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        print(f"resuming from {checkpoint.path} (step {done})", file=sys.stderr)
        for skipped in checkpoint.skipped:
            print(f"  passed over {skipped}", file=sys.stderr)
    metrics = open_metrics(files.metrics, last_step=done)
    tracker = make_tracker(run.telemetry, run_dir=files.root, run_name=run.name, resolved_config=to_dict(run))
    return Journal(metrics, tracker, Progress(run.train.steps, start_step=done, stream=sys.stderr))


def _peak_of_all_ranks(run: RunConfig, platform: Platform) -> float:
    """FLOP/s of all devices together. Collective: on a CPU the ranks share cores, so they measure at the same time."""
    dist.barrier()
    peak = torch.tensor(peak_flops_per_second(platform, run.train.precision), dtype=torch.float64)
    peak = peak.to(platform.device)
    dist.all_reduce(peak)
    return float(peak)
