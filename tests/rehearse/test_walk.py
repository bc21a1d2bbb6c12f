"""A rehearsal sees what a real run does: the same recorder in real gloo ranks, which really compute and really send."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from layouts import batch_of, make_run, start
from ranks import run_ranks

from megagrok.config.schema import ParallelConfig, RunConfig
from megagrok.parallel.groups import kinds_of_groups
from megagrok.parallel.ranks import Ranks
from megagrok.plan import num_micro_batches
from megagrok.platform import CPU
from megagrok.rehearse import Rehearsal, Traffic, rehearse
from megagrok.rehearse.collectives import Collectives
from megagrok.rehearse.observer import Observer
from megagrok.rehearse.rehearsal import Flops, Memory
from megagrok.rehearse.walk import Moments, micro_batches_to_walk, take_step

# As many micro-batches as a rehearsal walks, so that both walk all of them.
RUNS = {
    "tensor and sequence": make_run(parallel=ParallelConfig(tensor=2, sequence=True), global_batch=2),
    "experts": make_run(parallel=ParallelConfig(data=2, expert=2), global_batch=4, precision="bf16"),
    "tensor": make_run(parallel=ParallelConfig(tensor=2), global_batch=2),
    "no ZeRO": make_run(parallel=ParallelConfig(data=2, zero=0), global_batch=4),
    "context": make_run(parallel=ParallelConfig(context=2), global_batch=2, recompute="selective"),
    "pipeline": make_run(parallel=ParallelConfig(pipeline=2), global_batch=2, recompute="full"),
}
QUICK = ("experts", "pipeline")
Found = tuple[tuple[Traffic, ...], tuple[Flops, ...], Moments]


class PatientObserver(Observer):
    """gloo's threads let go of a buffer some time after its collective is over; the operation that follows waits."""

    after_collective = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.after_collective:
            time.sleep(0.01)
        self.after_collective = func.namespace == "c10d"
        return super().__torch_dispatch__(func, types, args, kwargs)


def real_step(_ranks: Ranks, run: RunConfig) -> Found:
    groups = start(run)
    collectives = Collectives(kinds_of_groups(groups))
    observer = PatientObserver(collectives)
    moments = take_step(run, groups, CPU, observer, batch_of(run, 0, groups))
    walked = num_micro_batches(run, run.train.global_batch)
    return collectives.traffic(walked), observer.flops(walked), moments


def calls(traffic: Iterable[Traffic]) -> dict[tuple[str, str, str], float]:
    return {(part.group, part.op, part.direction): part.calls for part in traffic}


def sizes(traffics: Iterable[Iterable[Traffic]]) -> Counter[tuple[str, str, str]]:
    """Over all ranks: what one expert rank has more, another has less."""
    total: Counter[tuple[str, str, str]] = Counter()
    for traffic in traffics:
        for part in traffic:
            total[part.group, part.op, part.direction] += round(part.size)
    return total


def flops(all_flops: Iterable[Iterable[Flops]]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for each in all_flops:
        for part in each:
            total[part.direction, part.op] += round(part.count)
    return total


def assert_same(run: RunConfig, real: list[Found], rehearsed: list[Rehearsal]) -> None:
    for (traffic, _, _), found in zip(real, rehearsed, strict=True):
        assert calls(traffic) == calls(found.traffic)
    assert sizes(traffic for traffic, _, _ in real) == sizes(found.traffic for found in rehearsed)
    assert flops(each for _, each, _ in real) == flops(found.flops for found in rehearsed)


def assert_same_memory(real: Memory, rehearsed: Memory, sends: int) -> None:
    """State to the byte. The rest within what real routing does; and `sends` are bytes of hidden states and their
    gradients, which gloo keeps until they are sent (model/transformer_config.py)."""
    state = ("weights", "gradients", "optimizer")
    assert [getattr(real, kind) for kind in state] == [getattr(rehearsed, kind) for kind in state]
    assert rehearsed.total <= 1.01 * real.total
    assert real.total <= 1.01 * rehearsed.total + sends


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_rehearsal_counts_what_real_ranks_do(name: str) -> None:
    run = RUNS[name]
    assert micro_batches_to_walk(run, 0) == num_micro_batches(run, run.train.global_batch)
    real = run_ranks(real_step, 2, run=run)
    rehearsed = [rehearse(run, rank) for rank in range(2)]
    assert_same(run, real, rehearsed)
    hidden_states = 4 * run.train.micro_batch * run.train.seq_len * run.model.hidden
    has_stages = run.parallel.pipeline > 1
    sends = 2 * num_micro_batches(run, run.train.global_batch) * hidden_states * has_stages
    for (_, _, moments), found in zip(real, rehearsed, strict=True):
        for moment in ("build", "forward_backward", "reduce", "step"):
            assert_same_memory(getattr(moments, moment), getattr(found, moment), sends)
