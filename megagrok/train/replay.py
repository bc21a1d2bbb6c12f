"""One step of a run made again, on one machine and in memory, to see whether it was the data, the maths or the machine.

Takes the newest checkpoint before the step and makes the steps between again as the run made them; nothing in the run's
folder is written, claimed or changed. On the layout and the kind of device that the run had, loss and norm come out bit
by bit; if they do not, something changed them then, or does now.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megagrok.checkpoint import Checkpoint, find_checkpoint, list_steps
from megagrok.config import RunConfig
from megagrok.data.audit import actions
from megagrok.data.batches import TrainBatches
from megagrok.data.prepare import PreparedData
from megagrok.engine.engine import Engine, build_engine
from megagrok.errors import CheckpointError, DataError
from megagrok.parallel.groups import make_groups
from megagrok.parallel.launch import count_gpus, run_ranks
from megagrok.parallel.ranks import Alone, ProcessGroupRanks
from megagrok.parallel.topology import Topology
from megagrok.plan import global_batch_at, world_size
from megagrok.platform import Platform
from megagrok.telemetry.metrics_file import read_metrics
from megagrok.train.beginning import collective_timeout_seconds, prepared_data
from megagrok.train.files import RunFiles
from megagrok.train.refusal import BadStep, read_bad_step, read_bad_steps
from megagrok.train.schedule import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What the run's own records say of the step."""

    loss: float | None
    grad_norm: float | None
    """None where nothing says it."""
    place: str
    """The file that says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What the step came to this time; equal on all ranks but for `bad`."""

    loss: float
    grad_norm: float
    bad: tuple[str, int] | None
    """First tensor of this rank whose gradient is not finite, in the order of the backward pass, and how many."""
    differing: int | None
    """The first of the steps before whose loss was not the recorded one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    step: int
    checkpoint: Checkpoint | None
    left_out: tuple[tuple[int, int], ...]
    skipped: frozenset[int]
    losses: Mapping[int, float]
    """Recorded, by step."""


def replay(run: RunConfig, files: RunFiles, step: int) -> bool:
    """Make `step` of the run in `files` again, with the settings `run`, and print what came of it.

    One process calls it, outside any process group. Returns whether loss and norm are, bit by bit, those on record;
    also True if there is no record. Raises DataError if the run has not come to that step.
    """
    page = read_bad_step(files, step)
    recorded, losses = _recorded(files, step, page)
    checkpoint = _newest_before(files, step)
    done = 0 if checkpoint is None else checkpoint.step
    origin = "the initial weights" if checkpoint is None else checkpoint.path.name
    print(f"replaying step {step} of {files.root} from {origin}: {step - 1 - done} steps are made again", flush=True)
    plan = _Plan(
        step=step,
        checkpoint=checkpoint,
        left_out=_left_out(files, checkpoint, page),
        skipped=frozenset(at for at, action in actions(files.ledger).items() if action == "skipped"),
        losses=losses,
    )
    prepared = prepared_data(run)
    timeout = collective_timeout_seconds(run)
    num_ranks = world_size(run.parallel)
    results = run_ranks(
        _replay_rank,
        num_ranks,
        run,
        prepared,
        plan,
        timeout,
        timeout_seconds=timeout,
        # As many as a run on one machine takes: sums of other blocks would be other bits.
        threads_per_rank=max(1, torch.get_num_threads() // num_ranks),
        on_gpus=count_gpus() >= num_ranks,
    )
    return _report(results, recorded)


def _replay_rank(
    ranks: ProcessGroupRanks, run: RunConfig, prepared: PreparedData, plan: _Plan, timeout_seconds: float
) -> Replayed:
    platform = Platform(ranks.device, dist.get_backend())
    groups = make_groups(
        Topology.of(run.parallel),
        virtual_pipeline=run.parallel.virtual_pipeline,
        platform=platform,
        timeout_seconds=timeout_seconds,
    )
    engine = build_engine(run, groups, platform)
    data = TrainBatches.of(run, prepared, groups.coordinates.data)
    done = 0
    if plan.checkpoint is not None:
        engine.load(plan.checkpoint)
        data.load_state(plan.checkpoint.facts["data"])  # type: ignore[arg-type]  # load_state checks what it is given
        done = plan.checkpoint.step
    data.leave_out(plan.left_out)
    differing: int | None = None
    for step in range(done + 1, plan.step):
        loss = _forward_backward(run, engine, data)
        engine.reduce_gradients()
        if step in plan.skipped:
            engine.drop_gradients()
        else:
            engine.step(_learning_rate(run, step))
        if differing is None and not _same(plan.losses.get(step), loss):
            differing = step
        if ranks.rank == 0:
            print(f"  step {step}: loss {loss:.6g}", file=sys.stderr, flush=True)
    loss = _forward_backward(run, engine, data)
    bad = engine.find_bad_gradient()
    engine.reduce_gradients()
    norm = engine.gradient_norm()
    # The norm on record is the one that clips: of the step itself, which moves this process's weights alone.
    update = engine.step(_learning_rate(run, plan.step))
    grad_norm = update.grad_norm if update.is_applied else norm
    return Replayed(loss=loss, grad_norm=grad_norm, bad=bad, differing=differing)


def _forward_backward(run: RunConfig, engine: Engine, data: TrainBatches) -> float:
    totals = engine.forward_backward(data.next_batch(global_batch_at(run.train, data.next_sample)))
    return totals.ce_sum / totals.num_tokens


def _learning_rate(run: RunConfig, step: int) -> float:
    return learning_rate(step, peak=run.optimizer.lr, schedule=run.schedule, total_steps=run.train.steps)


def _recorded(files: RunFiles, step: int, page: BadStep | None) -> tuple[Recorded, dict[int, float]]:
    """What is on record of the step: by the guard that refused it, else in the metrics."""
    steps = {record.step: record for record in read_metrics(files.metrics).steps}
    losses = {number: record.loss for number, record in steps.items()}
    if page is not None:
        return Recorded(loss=page.loss, grad_norm=page.grad_norm, place=f"bad/{step}.json"), losses
    if step in steps:
        return Recorded(loss=steps[step].loss, grad_norm=steps[step].grad_norm, place=files.metrics.name), losses
    if step > max(steps, default=0):
        raise DataError(f"{files.root} has no step {step}: its last one is {max(steps, default=0)}")
    return Recorded(loss=None, grad_norm=None, place=files.metrics.name), losses


def _newest_before(files: RunFiles, step: int) -> Checkpoint | None:
    for saved in list_steps(files.checkpoints):
        if saved < step:
            try:
                return find_checkpoint(files.checkpoints, ranks=Alone(), step=saved)
            except CheckpointError as error:
                print(f"note: {error}", file=sys.stderr)
    return None


def _left_out(files: RunFiles, checkpoint: Checkpoint | None, page: BadStep | None) -> tuple[tuple[int, int], ...]:
    """What the run left out from the checkpoint on; but not the very samples that made the step a bad one."""
    if checkpoint is None:
        return ()
    run_id = str(checkpoint.facts["run_id"])
    ranges = {range_ for other in read_bad_steps(files) if other.run_id == run_id for range_ in other.left_out}
    return tuple(sorted(range_ for range_ in ranges if page is None or range_[0] < page.first_sample))


def _report(results: list[Replayed], recorded: Recorded) -> bool:
    first = results[0]
    print(f"  loss       {first.loss!r}  {_compared(recorded.loss, first.loss, recorded.place)}")
    print(f"  grad norm  {first.grad_norm!r}  {_compared(recorded.grad_norm, first.grad_norm, recorded.place)}")
    bad = [(rank, result.bad) for rank, result in enumerate(results) if result.bad is not None]
    for rank, (name, count) in bad[:4]:
        print(f"  rank {rank}: {count} tensors have a gradient that is not finite, the first of them {name}")
    if not bad:
        print("  every gradient is finite on every rank, before it is reduced")
    if first.differing is not None:
        print(f"  the loss of step {first.differing} is not that of metrics.jsonl: another layout or device than then?")
    return _same(recorded.loss, first.loss) and _same(recorded.grad_norm, first.grad_norm)


def _compared(recorded: float | None, now: float, place: str) -> str:
    if recorded is None:
        return f"(not in {place})"
    return f"as in {place}, bit by bit" if _same(recorded, now) else f"DIFFERS from {recorded!r} in {place}"


def _same(recorded: float | None, now: float) -> bool:
    """A refused gradient's norm stands as NaN where it was infinite: both are not finite."""
    return recorded is None or recorded == now or not (math.isfinite(recorded) or math.isfinite(now))
