"""The race: all contenders in the same forked ranks, one step each in turn, and what the rounds say about them.

The order rotates, so a slow moment of the machine hits all alike, and a ratio is taken between steps of the same round.
"""

import math
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megagrok.bench.batches import random_batch
from megagrok.bench.peers import OURS, PEERS
from megagrok.bench.peers.contender import Contender
from megagrok.bench.spread import Spread
from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.errors import ConfigError, NonFiniteError, ShapeError
from megagrok.parallel.groups import make_groups
from megagrok.parallel.launch import run_ranks
from megagrok.parallel.ranks import ProcessGroupRanks
from megagrok.parallel.topology import Topology
from megagrok.plan import total_params, training_flops_per_token, world_size
from megagrok.plan.flops import mfu
from megagrok.platform import Platform, measure_matmul_flops
from megagrok.train.schedule import learning_rate

if TYPE_CHECKING:
    from megagrok.bench.peers import Make

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
class Result:
    """One contender over all rounds. `ratio` is megagrok's tokens per second over this one's, round by round."""

    name: str
    params: int
    tokens_per_second: Spread
    mfu: float
    """Of plain matmuls on all ranks at the same time."""
    cpu_seconds_per_step: Spread
    """CPU time of all ranks together: what the step costs, whoever else uses the machine."""
    ratio: Spread
    cpu_ratio: Spread
    """This contender's CPU seconds over megagrok's."""
    first_loss: float
    last_loss: float


@dataclass(frozen=True, slots=True)
class _OneRank:
    """What one rank brings home."""

    params: dict[str, int]
    steps: dict[str, list[Timed]]
    matmul_flops: float


def race(run: RunConfig, names: Sequence[str], rounds: int) -> tuple[list[Result], float]:
    """Race contenders of PEERS over `rounds` rounds, ours first; and FLOP/s of plain matmuls, all ranks together.

    One process calls it, outside any process group, before it runs torch. CPU only. Raises ConfigError for what a peer
    cannot do, NonFiniteError, and ShapeError if they are not one model.
    """
    refuse_what_a_peer_cannot_do(run)
    makers = [PEERS[name].load() for name in PEERS if name in (OURS, *names)]
    with tempfile.TemporaryDirectory(prefix="megagrok-race-") as scratch:
        by_rank = run_ranks(
            _race,
            world_size(run.parallel),
            run,
            makers,
            rounds,
            timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
            # What the libraries of the peers have to say; an error comes here as one.
            log_of=lambda rank: Path(scratch) / f"rank-{rank}.log",
        )
    first = by_rank[0]
    tokens = run.train.global_batch * run.train.seq_len
    peak = sum(one.matmul_flops for one in by_rank)
    seconds = {name: [step.seconds for step in steps] for name, steps in first.steps.items()}
    cpu = {
        name: [sum(one.steps[name][number].cpu_seconds for one in by_rank) for number in range(rounds)]
        for name in first.steps
    }
    ours = PEERS[OURS].title
    results = []
    for name, steps in first.steps.items():
        speed = Spread.of([tokens / value for value in seconds[name]])
        result = Result(
            name=name,
            params=first.params[name],
            tokens_per_second=speed,
            mfu=mfu(speed.median, training_flops_per_token(run.model, run.train.seq_len), peak),
            cpu_seconds_per_step=Spread.of(cpu[name]),
            ratio=Spread.of([its / our for its, our in zip(seconds[name], seconds[ours], strict=True)]),
            cpu_ratio=Spread.of([its / our for its, our in zip(cpu[name], cpu[ours], strict=True)]),
            first_loss=steps[0].loss,
            last_loss=steps[-1].loss,
        )
        results.append(result)
    return results, peak


def refuse_what_a_peer_cannot_do(run: RunConfig) -> None:
    """Raises ConfigError with every setting that one of the peers has no counterpart of, as they are run here."""
    model, parallel = run.model, run.parallel
    refused = {
        "model.tied_embeddings": model.tied_embeddings,
        "model.moe.residual_ffn_hidden": model.moe.residual_ffn_hidden is not None,
        "parallel.context": parallel.context > 1,
        "parallel.virtual_pipeline": parallel.virtual_pipeline > 1,
        "parallel.tensor without parallel.sequence": parallel.tensor > 1 and not parallel.sequence,
        "train.precision": run.train.precision != "fp32",
    }
    if any(refused.values()):
        settings = ", ".join(setting for setting, is_refused in refused.items() if is_refused)
        raise ConfigError(f"the peers of this benchmark do not run {settings}; leave it at its default")


def _race(ranks: ProcessGroupRanks, run: RunConfig, makers: "Sequence[Make]", rounds: int) -> _OneRank:
    """Runs on every rank. Parameters and timed steps of each contender, ours first."""
    platform = Platform(ranks.device, dist.get_backend())
    groups = make_groups(
        Topology.of(run.parallel), virtual_pipeline=1, platform=platform, timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS
    )
    field: list[Contender] = [make(run, groups, platform) for make in makers]
    params = {contender.name: contender.num_params for contender in field}
    steps: dict[str, list[Timed]] = {contender.name: [] for contender in field}
    matmul_flops: list[float] = []
    for number in range(WARM_UP_ROUNDS + rounds):
        batch = random_batch(run, groups, number)
        total_steps = max(run.train.steps, number + 1)
        lr = learning_rate(number + 1, peak=run.optimizer.lr, schedule=run.schedule, total_steps=total_steps)
        first = number % len(field)
        for contender in field[first:] + field[:first]:
            steps[contender.name].append(_time(ranks, contender, batch, lr))
        if number == 0:
            _refuse_unequal(params, {name: timed[0].loss for name, timed in steps.items()}, total_params(run.model))
        ranks.barrier()
        matmul_flops.append(measure_matmul_flops(platform, run.train.precision, seconds=0.1))
    timed = {name: timed[WARM_UP_ROUNDS:] for name, timed in steps.items()}
    return _OneRank(params, timed, statistics.median(matmul_flops))


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


def _refuse_unequal(params: dict[str, int], losses: dict[str, float], expected: int) -> None:
    """Contenders must be the same model as far as sizes and first losses can tell. Raises ShapeError."""
    first_loss = next(iter(losses.values()))
    for name in params:
        if abs(params[name] - expected) > MOST_PARAMETER_DIFFERENCE * expected:
            raise ShapeError(f"{name} has {params[name]:,} parameters, the configuration {expected:,}: not comparable")
        if abs(losses[name] - first_loss) > MOST_FIRST_LOSS_DIFFERENCE * first_loss:
            raise ShapeError(f"{name} starts at loss {losses[name]:.4f}, megagrok at {first_loss:.4f}: not comparable")
