"""The race itself: all contenders in the same ranks, one step each in turn, and what the rounds say about them.

Imports Megatron and DeepSpeed, so it is imported before the ranks are forked, which then have them.
"""

import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from contenders import Contender, MegagrokStep, StockMoeStep
from megatron_gpt import MegatronStep

from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.errors import NonFiniteError, ShapeError
from megagrok.parallel.groups import ProcessGroups, make_groups
from megagrok.parallel.launch import run_ranks
from megagrok.parallel.ranks import ProcessGroupRanks
from megagrok.parallel.topology import Topology
from megagrok.plan import total_params, world_size
from megagrok.platform import Platform
from megagrok.train.schedule import learning_rate

WARM_UP_ROUNDS = 2
COLLECTIVE_TIMEOUT_SECONDS = 120.0
MOST_PARAMETER_DIFFERENCE = 0.02
# Grok scales its first logits, Megatron does not: both start near a guess among all tokens, not at the same loss.
MOST_FIRST_LOSS_DIFFERENCE = 0.1


@dataclass(frozen=True, slots=True)
class Timed:
    """One step of one contender: wall seconds until every rank is done, this rank's CPU seconds, mean loss."""

    seconds: float
    cpu_seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """One contender over all rounds. `ratio` is megagrok's tokens per second over this one's, round by round."""

    name: str
    params: int
    tokens_per_second: Spread
    cpu_seconds_per_step: Spread
    """CPU time of all ranks together: what the step costs, whoever else uses the machine."""
    ratio: Spread
    cpu_ratio: Spread
    """This contender's CPU seconds over megagrok's."""
    first_loss: float
    last_loss: float


def measure(run: RunConfig, repeats: int) -> list[Result]:
    """Race all contenders over `repeats` rounds. Raises NonFiniteError, and ShapeError if they are not one model."""
    by_rank = run_ranks(_race, world_size(run.parallel), run, repeats, timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS)
    params, first = by_rank[0]
    tokens = run.train.global_batch * run.train.seq_len
    seconds = {name: [step.seconds for step in steps] for name, steps in first.items()}
    cpu = {
        name: [
            sum(steps[name][number].cpu_seconds for _, steps in by_rank)  # of all ranks
            for number in range(repeats)
        ]
        for name in first
    }
    ours = next(iter(first))
    return [
        Result(
            name=name,
            params=params[name],
            tokens_per_second=Spread.of([tokens / value for value in seconds[name]]),
            cpu_seconds_per_step=Spread.of(cpu[name]),
            ratio=Spread.of([its / our for its, our in zip(seconds[name], seconds[ours], strict=True)]),
            cpu_ratio=Spread.of([its / our for its, our in zip(cpu[name], cpu[ours], strict=True)]),
            first_loss=steps[0].loss,
            last_loss=steps[-1].loss,
        )
        for name, steps in first.items()
    ]


def _race(ranks: ProcessGroupRanks, run: RunConfig, repeats: int) -> tuple[dict[str, int], dict[str, list[Timed]]]:
    """Runs on every rank. Parameters and timed steps of each contender, megagrok first."""
    cpu = Platform(torch.device("cpu"), "gloo")
    groups = make_groups(
        Topology.of(run.parallel), virtual_pipeline=1, platform=cpu, timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS
    )
    field: list[Contender] = [
        MegagrokStep(run, groups, cpu),
        MegatronStep(run, groups, cpu),
        StockMoeStep(run, groups, cpu),
    ]
    params = {contender.name: contender.num_params for contender in field}
    steps: dict[str, list[Timed]] = {contender.name: [] for contender in field}
    for number in range(WARM_UP_ROUNDS + repeats):
        batch = random_batch(run, groups, number)
        lr = learning_rate(number + 1, peak=run.optimizer.lr, schedule=run.schedule, total_steps=run.train.steps)
        first = number % len(field)
        for contender in field[first:] + field[:first]:
            steps[contender.name].append(_time(ranks, contender, batch, lr))
        if number == 0:
            _refuse_unequal(params, {name: timed[0].loss for name, timed in steps.items()}, total_params(run.model))
    return params, {name: timed[WARM_UP_ROUNDS:] for name, timed in steps.items()}


def _time(ranks: ProcessGroupRanks, contender: Contender, batch: Batch, lr: float) -> Timed:
    ranks.barrier()
    cpu, start = _cpu_seconds(), time.perf_counter()
    loss = contender.step(batch, lr)
    cpu_seconds = _cpu_seconds() - cpu
    ranks.barrier()
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise NonFiniteError(f"{contender.name}: loss is {loss}, so its step cannot be timed")
    return Timed(seconds, cpu_seconds, loss)


def _cpu_seconds() -> float:
    """Of all threads of this process, gloo's too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def random_batch(run: RunConfig, groups: ProcessGroups, step: int) -> Batch:
    """This data rank's part of a global batch of uniform random tokens; the same for every contender."""
    train, topology = run.train, groups.topology
    stream = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, run.model.vocab_size, (train.global_batch, train.seq_len + 1), generator=stream)
    mine = tokens.view(-1, topology.data, train.micro_batch, train.seq_len + 1)[:, groups.coordinates.data]
    return Batch(
        tokens_MBS=mine[..., :-1].contiguous(),
        labels_MBS=mine[..., 1:].contiguous(),
        sample_ids=(),
        document_ids=(),
    )


def _refuse_unequal(params: dict[str, int], losses: dict[str, float], expected: int) -> None:
    """Contenders must be the same model as far as sizes and first losses can tell. Raises ShapeError."""
    first_loss = next(iter(losses.values()))
    for name in params:
        if abs(params[name] - expected) > MOST_PARAMETER_DIFFERENCE * expected:
            raise ShapeError(f"{name} has {params[name]:,} parameters, the configuration {expected:,}: not comparable")
        if abs(losses[name] - first_loss) > MOST_FIRST_LOSS_DIFFERENCE * first_loss:
            raise ShapeError(f"{name} starts at loss {losses[name]:.4f}, megagrok at {first_loss:.4f}: not comparable")
