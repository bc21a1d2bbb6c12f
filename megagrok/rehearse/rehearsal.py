"""What a rehearsal found: bytes at the peaks, messages, operations. Plain values, no torch."""

from dataclasses import astuple, dataclass
from typing import Literal

Direction = Literal["forward", "backward", "recompute"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that are allocated at one moment, by what they are. Names as in `megagrok.plan.estimate.StageBytes`."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Outlived the forward call they were made in: kept for the backward pass, of all micro-batches in flight."""
    transient: int = 0
    """Made and freed inside one forward or backward call, or inside the optimizer step."""
    logits: int = 0
    """Made between the last layer and the loss, and their gradients."""
    communication: int = 0
    """Buffers that stay, and those that the reduction of the gradients makes."""

    @property
    def total(self) -> int:
        """All of it: what torch counts as allocated."""
        return sum(astuple(self))

    @property
    def working(self) -> int:
        """What forward and backward passes need beside the state; Megatron's buffer for gathered tokens too."""
        return self.activations + self.transient + self.logits + self.communication


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one kind over one group. `size` is the bytes of the whole tensor that one gathers, reduces,
    exchanges or sends, all calls together."""

    group: str
    op: str
    direction: Direction | Literal["once", "start"]
    """once: not for each micro-batch, but once a step.  start: when the engine is built."""
    calls: float
    """Of one micro-batch, or of one step for "once". Messages between stages all count as forward."""
    size: float


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one micro-batch in one direction that one of torch's operations did."""

    direction: Direction
    op: str
    count: float


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A module of one layer: the shapes of its weights and of what it returns."""

    module: str
    weights: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One rank's step."""

    rank: int
    world_size: int
    stage: int
    micro_batches: int
    """Walked; enough that as many are in flight on this stage as ever are."""
    micro_batches_of_step: int
    """Of each replica at the full batch; every figure for one micro-batch comes so often."""
    build: Memory
    """After the engine was built."""
    forward_backward: Memory
    """At the peak of all forward and backward passes."""
    reduce: Memory
    """At the peak of the reduction of the gradients."""
    step: Memory
    """At the peak of clip, AdamW and gathering the weights."""
    traffic: tuple[Traffic, ...]
    flops: tuple[Flops, ...]
    shapes: tuple[LayerShape, ...]
    seconds: float
    """That the rehearsal took."""
    replaced: tuple[str, ...]
    """What is not as in the real run, in words."""

    @property
    def peak(self) -> Memory:
        """The largest of the moments."""
        return max((self.forward_backward, self.reduce, self.step), key=lambda memory: memory.total)

    def total_flops(self, *directions: Direction) -> float:
        """FLOPs of one micro-batch on this rank; of all directions if none is named."""
        return sum(part.count for part in self.flops if not directions or part.direction in directions)

    def traffic_bytes(self, group: str, *directions: str) -> float:
        """Bytes over one kind of group; of one micro-batch, or of one step for direction "once"."""
        chosen = directions or ("forward", "backward", "recompute")
        return sum(part.size for part in self.traffic if part.group == group and part.direction in chosen)
