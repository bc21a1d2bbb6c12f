"""One step of any rank's real training code, in pretence: groups, model, schedule, reduction, AdamW."""

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megagrok.config.schema import RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.engine import Engine, Fill, build_engine
from megagrok.errors import TopologyError
from megagrok.model.parts import fill_initial_values
from megagrok.parallel import launch
from megagrok.parallel.groups import ProcessGroups, kinds_of_groups, make_groups
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.topology import Topology
from megagrok.plan import num_micro_batches
from megagrok.platform import Platform
from megagrok.rehearse.collectives import Collectives
from megagrok.rehearse.known import KnownNumbers
from megagrok.rehearse.load import Load
from megagrok.rehearse.observer import Observer
from megagrok.rehearse.pretence import FAKE, pretended_peers, pretended_tensors
from megagrok.rehearse.rehearsal import Memory, Rehearsal
from megagrok.rehearse.storages import Storage

_TIMEOUT_SECONDS = 60.0


def rehearse(run: RunConfig, rank: int, *, fullest: float | None = None) -> Rehearsal:
    """Walk one step of rank `rank` of the whole job, in a process of its own (Megatron and DeepSpeed keep their groups
    in globals). The run has to be one that `plan.check` accepts.

    fullest: share of all choices that goes to the fullest expert, which is this rank's; None is balanced.
    Raises TopologyError for a rank that the layout does not have, ConfigError for a share that no routing has.
    """
    topology = Topology.of(run.parallel)
    if not 0 <= rank < topology.world_size:
        raise TopologyError(f"rank {rank} is outside 0 .. {topology.world_size - 1}, the ranks of this layout")
    place = topology.coordinates(rank)
    load = Load.of(run.model.moe, topology.expert, place.expert, fullest)
    (rehearsal,) = launch.run_ranks(
        partial(_walk, run=run, rank=rank, load=load),
        1,
        timeout_seconds=_TIMEOUT_SECONDS,
        log_of=_unread,
    )
    return rehearsal


def micro_batches_to_walk(run: RunConfig, stage: int) -> int:
    """As few as bring as many into flight on that stage as ever are, and no more than the step has. Interleaved chunks
    go round in runs of as many micro-batches as there are stages, and fill the first stage in the second run."""
    pipeline, chunks = run.parallel.pipeline, run.parallel.virtual_pipeline
    needed = 2 * pipeline if chunks > 1 else max(2, pipeline - stage + 1)
    return min(num_micro_batches(run, run.train.global_batch), needed)


def _unread(_rank: int) -> Path:
    """Where what the libraries print goes; what they raise comes back."""
    return Path(os.devnull)


def _walk(_alone: Ranks, run: RunConfig, rank: int, load: Load) -> Rehearsal:
    """In the forked process."""
    started = time.perf_counter()
    topology = Topology.of(run.parallel)
    micro_batches = micro_batches_to_walk(run, topology.coordinates(rank).pipeline)
    with pretended_peers(rank, topology.world_size):
        groups = make_groups(
            topology,
            virtual_pipeline=run.parallel.virtual_pipeline,
            platform=FAKE,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        collectives = Collectives(kinds_of_groups(groups))
        observer = Observer(collectives, KnownNumbers(load))
        with pretended_tensors():
            batch = _batch_of_zeros(run, micro_batches)
            moments = take_step(as_walked(run), groups, FAKE, observer, batch, fill=lambda *_: None)
        return Rehearsal(
            rank=rank,
            world_size=topology.world_size,
            stage=groups.coordinates.pipeline,
            micro_batches=micro_batches,
            micro_batches_of_step=num_micro_batches(run, run.train.global_batch),
            build=moments.build,
            forward_backward=moments.forward_backward,
            reduce=moments.reduce,
            step=moments.step,
            traffic=collectives.traffic(micro_batches),
            flops=observer.flops(micro_batches),
            shapes=observer.shapes(),
            seconds=time.perf_counter() - started,
            replaced=_replaced(run, load),
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Memory after the build, and at the peak of each part of a step."""

    build: Memory
    forward_backward: Memory
    reduce: Memory
    step: Memory


def take_step(
    run: RunConfig,
    groups: ProcessGroups,
    platform: Platform,
    observer: Observer,
    batch: Batch,
    fill: Fill = fill_initial_values,
) -> Moments:
    """Build, forward and backward, reduce, step, all of it seen by `observer`; with tensors that hold numbers too."""
    ends: list[int] = [0]

    def enter(phase: str) -> None:
        ends.append(observer.storages.moment)
        observer.phase = phase

    with observer.watching():
        engine = build_engine(run, groups, platform, fill=fill)
        standing = _Standing(engine, observer)
        enter("forward_backward")
        engine.forward_backward(batch)
        standing.look_at_gradients()
        enter("reduce")
        engine.reduce_gradients()
        enter("step")
        engine.step(run.optimizer.lr)
        ends.append(observer.storages.moment)
    _, built, computed, reduced, stepped = ends
    peak = observer.storages.peak
    return Moments(
        build=standing.weigh(peak(built, built)),
        forward_backward=standing.weigh(peak(built + 1, computed)),
        reduce=standing.weigh(peak(computed + 1, reduced)),
        step=standing.weigh(peak(reduced + 1, stepped)),
    )


def _batch_of_zeros(run: RunConfig, micro_batches: int) -> Batch:
    shape = (micro_batches, run.train.micro_batch, run.train.seq_len)
    return Batch(
        tokens_MBS=torch.zeros(shape, dtype=torch.int64),
        labels_MBS=torch.zeros(shape, dtype=torch.int64),
        sample_ids=tuple(range(micro_batches * run.train.micro_batch)),
        document_ids=(),
    )


class _Standing:
    """What stands through the step, told apart by whose it is; all else is told apart by when it lived."""

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self._engine, self._observer = engine, observer
        self._kinds: dict[int, str] = {}
        for item in engine.local_parameters:
            self._mark(item.parameter, "weights")

    def look_at_gradients(self) -> None:
        """Take note of where gradients are, between their making and their reduction."""
        for item in self._engine.local_parameters:
            gradient = self._engine.find_gradient(item.parameter)
            if gradient is not None:
                self._mark(gradient, "gradients")

    def weigh(self, alive: list[Storage]) -> Memory:
        """Bytes by kind."""
        sizes: dict[str, int] = {}
        for storage in alive:
            kind = self._kind(storage)
            sizes[kind] = sizes.get(kind, 0) + storage.size
        return Memory(**sizes)

    def _mark(self, tensor: torch.Tensor, kind: str) -> None:
        life = self._observer.storages.life_of(tensor)
        assert life is not None
        self._kinds[id(life)] = kind

    def _kind(self, storage: Storage) -> str:
        if id(storage) in self._kinds:
            return self._kinds[id(storage)]
        if storage.phase == "build":
            return "optimizer"
        if storage.phase == "reduce" or (storage.phase == "forward_backward" and storage.died is None):
            return "communication"
        if storage.phase == "step":
            return "transient"
        if storage.is_head:
            return "logits"
        if storage.is_backward or not self._outlives_its_call(storage):
            return "transient"
        return "activations"

    def _outlives_its_call(self, storage: Storage) -> bool:
        end = next((moment for moment in self._observer.forward_ends if moment >= storage.born), None)
        return end is not None and (storage.died is None or storage.died > end + 1)


def as_walked(run: RunConfig) -> RunConfig:
    """The run as it can be walked here: bf16 in the place of fp8."""
    return replace(run, train=replace(run.train, precision="bf16")) if run.train.precision == "fp8" else run


def _replaced(run: RunConfig, load: Load) -> tuple[str, ...]:
    sentences = [
        f"token counts of the experts: {load}; all ranks route alike",
        "losses and norms: 1, so that the step is finite and taken",
        "collectives: answered at once; no bytes are sent, and nothing waits",
        "device: no CUDA context, no rounding of sizes and no slack of an allocator, no NCCL buffers, no workspaces "
        "inside kernels",
    ]
    if run.train.precision == "fp8":
        sentences.append(
            "fp8: Megatron's linears in bf16 for Transformer Engine's; casts and their copies are not seen"
        )
    return tuple(sentences)
