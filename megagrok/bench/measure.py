"""`megagrok bench`: the training step of a configuration, timed on this machine, and its loss ledger.

The step is the trainer's, without what watches it: next batch, forward and backward, reduction, update. Timed steps and
recorded steps take turns, so a slow moment of the machine hits both; the speed is that of the timed ones, which nothing
observes, and the ledger of the recorded ones has to add up to it.

A ledger is the mean over the ranks: with it a row is what the whole machine spends, and `imbalance` what it loses to
its slowest rank. It is that of the recorded step of median length, so that its rows add up.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megagrok.bench.batches import random_batch
from megagrok.bench.ledger import ROWS, Timeline, settle
from megagrok.bench.routing import balance, routers_built
from megagrok.bench.spread import Spread
from megagrok.bench.trace import Sections, trace_step
from megagrok.checkpoint import AsyncSaver
from megagrok.config import RunConfig
from megagrok.data.batches import Batch, TrainBatches
from megagrok.data.prepare import PreparedData
from megagrok.engine.engine import Engine, build_engine
from megagrok.errors import MachineError, NonFiniteError
from megagrok.parallel.groups import ProcessGroups, make_groups
from megagrok.parallel.launch import count_gpus, run_ranks
from megagrok.parallel.ranks import ProcessGroupRanks
from megagrok.parallel.topology import Topology
from megagrok.plan import training_flops_per_token, world_size
from megagrok.plan.flops import mfu, recomputed_flops_per_token
from megagrok.platform import Platform, measure_matmul_flops, peak_flops_per_second
from megagrok.train.beginning import prepared_data
from megagrok.train.schedule import learning_rate

COLLECTIVE_TIMEOUT_SECONDS = 120.0
_MATMUL_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to measure. Nothing of it is a setting of a run."""

    steps: int = 10
    """Timed, and as many recorded, in turns."""
    warmup: int = 3
    routing: Literal["balanced", "natural"] = "natural"
    data: Literal["synthetic", "real"] = "synthetic"
    spoil: Callable[[int, Engine], None] | None = None
    """Called with rank and engine before the first step; tests plant what a ledger has to find."""


@dataclass(frozen=True, slots=True)
class OneRank:
    """What one rank brings home."""

    timed: list[float]
    recorded: list[Timeline]
    timed_cpu: list[float]
    """CPU seconds of the rank's thread in the timed steps."""
    matmul_flops: list[float]
    checkpoint_seconds: float
    """A save holds the step for so long."""
    loss: float
    datasheet_flops: float
    """0 on a CPU."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a step went, in seconds a row, mean over the ranks."""

    rows: dict[str, float]
    by_rank: list[dict[str, float]]
    total: float
    timed: float
    """The median step that nothing observed."""
    recorded: float
    """The same step as `total` with the cost of recording left in."""
    event_seconds: float
    events: int
    """Operations that were recorded, on one rank."""
    pairs: Spread
    """Of every recorded step the sum of its rows over the timed step just before it."""

    @property
    def difference(self) -> float:
        """The sum of the rows against the timed step, as a fraction of it. `checkpoint` is in neither."""
        return self.total / self.timed - 1

    @property
    def overhead(self) -> float:
        """What recording added to the step, as a fraction of the timed one."""
        return self.recorded / self.timed - 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One configuration on one machine."""

    step_seconds: Spread
    tokens_per_second: Spread
    model_flops_per_token: int
    hardware_flops_per_token: int
    matmul_flops: Spread
    """FLOP/s of plain matmuls, all ranks at the same time, together."""
    datasheet_flops: float | None
    """All devices together; None on a CPU, which has no such number."""
    loss: float
    ledger: Ledger | None
    """None on a GPU, whose kernels run behind the host that is recorded here."""

    def mfu(self, peak: float) -> float:
        """Model FLOPs over a peak of all devices."""
        return mfu(self.tokens_per_second.median, self.model_flops_per_token, peak)

    def hfu(self, peak: float) -> float:
        """The same with what is computed again."""
        return mfu(self.tokens_per_second.median, self.hardware_flops_per_token, peak)


def measure(run: RunConfig, request: Request) -> Measured:
    """Measure a run that `check` lets pass. One process calls it, outside any process group, before it runs torch.

    Raises DataError without the data, NonFiniteError if the loss is not finite.
    """
    prepared = prepared_data(run) if request.data == "real" else None
    ranks, gpus = world_size(run.parallel), count_gpus()
    if gpus and gpus < ranks:
        raise MachineError(f"{ranks} ranks, and this machine shows {gpus} GPUs: start at most {gpus}")
    with tempfile.TemporaryDirectory(prefix="megagrok-bench-") as scratch:
        found = run_ranks(
            _measure_rank,
            ranks,
            run,
            request,
            prepared,
            Path(scratch),
            timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
            # The profiler's library says hello on standard error each time.
            log_of=lambda rank: Path(scratch) / f"rank-{rank}.log",
            on_gpus=gpus > 0,
        )
    return _measured(run, found, on_gpus=gpus > 0)


def _measured(run: RunConfig, found: list[OneRank], *, on_gpus: bool) -> Measured:
    tokens = run.train.global_batch * run.train.seq_len
    # A step is over when its last rank is done.
    timed = [max(seconds) for seconds in zip(*(one.timed for one in found), strict=True)]
    together = [sum(flops) for flops in zip(*(one.matmul_flops for one in found), strict=True)]
    model_flops = training_flops_per_token(run.model, run.train.seq_len)
    again = recomputed_flops_per_token(run.model, run.train.seq_len, run.train.recompute)
    datasheet = None
    if on_gpus:
        datasheet = sum(one.datasheet_flops for one in found)
    return Measured(
        step_seconds=Spread.of(timed),
        tokens_per_second=Spread.of([tokens / seconds for seconds in timed]),
        model_flops_per_token=model_flops,
        hardware_flops_per_token=model_flops + again,
        matmul_flops=Spread.of(together),
        datasheet_flops=datasheet,
        loss=found[0].loss,
        ledger=None if on_gpus else make_ledger(run, found, timed),
    )


def make_ledger(run: RunConfig, found: list[OneRank], timed: list[float]) -> Ledger:
    """The ledger of the recorded step of median length, the cost of recording taken out. timed: seconds of each step
    that nothing observed."""
    event_seconds = statistics.median(event_cost(one) for one in found)
    steps = [settle([one.recorded[number] for one in found], event_seconds) for number in range(len(found[0].recorded))]
    totals = [statistics.mean(sum(rows.values()) for rows in by_rank) for by_rank in steps]
    number = totals.index(statistics.median_low(totals))
    by_rank = steps[number]
    rows = {row: statistics.mean(rank[row] for rank in by_rank) for row in ROWS}
    rows["checkpoint"] = max(one.checkpoint_seconds for one in found) / run.checkpoint.every_steps
    return Ledger(
        rows=rows,
        by_rank=by_rank,
        total=totals[number],
        timed=statistics.median(timed),
        recorded=statistics.mean(one.recorded[number].seconds for one in found),
        event_seconds=event_seconds,
        events=found[0].recorded[number].events,
        pairs=Spread.of([total / seconds for total, seconds in zip(totals, timed, strict=True)]),
    )


def event_cost(one: OneRank) -> float:
    """What recording an operation costs a rank, by the CPU seconds of its thread: those of recorded steps over those
    of timed ones. Not by the clock, which the ledger has to add up to."""
    recorded = statistics.median(timeline.cpu_seconds for timeline in one.recorded)
    return max(0.0, recorded - statistics.median(one.timed_cpu)) / one.recorded[0].events


def _measure_rank(
    ranks: ProcessGroupRanks, run: RunConfig, request: Request, prepared: PreparedData | None, scratch: Path
) -> OneRank:
    platform = Platform(ranks.device, dist.get_backend())
    groups = make_groups(
        Topology.of(run.parallel),
        virtual_pipeline=run.parallel.virtual_pipeline,
        platform=platform,
        timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
    )
    with routers_built() as routers:
        engine = build_engine(run, groups, platform)
    if request.routing == "balanced":
        for router in routers:
            balance(router)
    if request.spoil is not None:
        request.spoil(ranks.rank, engine)
    steps = _Steps(run, engine, _batches(run, groups, prepared), platform)
    for _ in range(request.warmup):
        steps.take(Sections())
    if not platform.is_cuda:
        # Once unseen: the profiler's own first time takes longer.
        trace_step(steps.take, groups, ranks)
    timed, recorded, cpu = [], [], []
    for _ in range(request.steps):
        ranks.barrier()
        cpu_before = time.thread_time()
        timed.append(_seconds(lambda: steps.take(Sections())))
        cpu.append(time.thread_time() - cpu_before)
        if not platform.is_cuda:
            recorded.append(trace_step(steps.take, groups, ranks))
    return OneRank(
        timed,
        recorded,
        cpu,
        _matmul_flops(ranks, platform, run.train.precision),
        _checkpoint_seconds(ranks, engine, scratch),
        steps.loss,
        peak_flops_per_second(platform, run.train.precision) if platform.is_cuda else 0.0,
    )


class _Steps:
    """The trainer's step, without what watches it."""

    def __init__(self, run: RunConfig, engine: Engine, batches: Iterator[Batch], platform: Platform) -> None:
        self._run, self._engine, self._batches, self._platform = run, engine, batches, platform
        self._done = 0
        self.loss = float("nan")

    def take(self, sections: Sections) -> None:
        """One step. Collective. Raises NonFiniteError."""
        self._done += 1
        with sections.during("loading"):
            batch = next(self._batches)
        totals = self._engine.forward_backward(batch)
        run = self._run
        with sections.during("optimizer"):
            self._engine.reduce_gradients()
            lr = learning_rate(
                self._done, peak=run.optimizer.lr, schedule=run.schedule, total_steps=max(run.train.steps, self._done)
            )
            update = self._engine.step(lr)
        self._platform.wait()
        self.loss = totals.ce_sum / totals.num_tokens
        if not update.is_applied:
            raise NonFiniteError(f"step {self._done} has loss {self.loss} and was refused: its time means nothing")


def _batches(run: RunConfig, groups: ProcessGroups, prepared: PreparedData | None) -> Iterator[Batch]:
    if prepared is not None:
        data = TrainBatches.of(run, prepared, groups.coordinates.data)
        while True:
            yield data.next_batch(run.train.global_batch)
    step = 0
    while True:
        step += 1
        yield random_batch(run, groups, step)


def _matmul_flops(ranks: ProcessGroupRanks, platform: Platform, precision: str) -> list[float]:
    found = []
    for _ in range(_MATMUL_ROUNDS):
        ranks.barrier()
        found.append(measure_matmul_flops(platform, precision))
    return found


def _checkpoint_seconds(ranks: ProcessGroupRanks, engine: Engine, scratch: Path) -> float:
    """How long a save holds the step: the second one, since the first also makes its buffer."""
    saver = AsyncSaver(scratch / "checkpoints", ranks=ProcessGroupRanks(dist.new_group(backend="gloo")), keep=2)
    held = 0.0
    for step in (1, 2):
        ranks.barrier()
        held = _seconds(lambda step=step: saver.save(step, engine.state_fragments(), {"updates": step}))  # type: ignore[misc]
        saver.finish()
    return held


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
