"""What one layout costs: bytes on the fullest rank of each pipeline stage, seconds of a step by what they went to."""

from dataclasses import astuple, dataclass

from megagrok.plan.gpus import Gpu
from megagrok.plan.shape import MEGAGROK, Habits, Layout, Shape


@dataclass(frozen=True, slots=True)
class Machine:
    """The cluster, as far as a plan sees it. Bandwidths are bytes per second, one direction, per GPU."""

    gpu: Gpu
    gpus_per_node: int
    network_bandwidth: float


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes on the fullest rank of one pipeline stage at the peak of a step, by what they are."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of all micro-batches in flight here, dispatch buffers too, if routing is balanced."""
    transient: int
    """Working memory of the layer that is being computed: recomputed parts, attention scores, their gradients."""
    logits: int
    """Of the last stage: output head to cross-entropy, with its gradient."""
    imbalance: int
    """What the p99 of routing skew adds to activations and transient."""
    communication: int
    """Buckets of gradient reduction, communicators."""
    reserve: int
    """CUDA context and the allocator's slack."""

    @property
    def allocated(self) -> int:
        """What torch counts as allocated: all but the reserve."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        """All of it."""
        return int(sum(astuple(self)))


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One step on the critical path, cut into parts that add up to the whole. Also the rows of bench's loss ledger."""

    matmul: float
    """Linear layers, experts and output head, forward and backward, at their achieved rate."""
    attention: float
    """Scores and weighted values."""
    memory_bound: float
    """Norms, activation functions, rotary angles, casts, permutations, cross-entropy."""
    recompute: float
    launch: float
    """The device waits for the host to launch."""
    tensor: float
    """Communication that nothing hides, by group: tensor, context, expert, pipeline and data ranks."""
    context: float
    expert: float
    pipeline: float
    data: float
    imbalance: float
    """Wait for the expert rank with the most tokens, and for the slowest of all ranks."""
    bubble: float
    """A stage has no micro-batch: fill, drain, and the wait for a heavier stage."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(astuple(self)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A layout's price on a machine."""

    layout: Layout
    stages: tuple[StageBytes, ...]
    seconds: StepSeconds
    tokens_per_second: float
    """Of all GPUs."""
    mfu: float
    """Model FLOPs (see flops.CONVENTION) over the peak of the run's precision."""
    hfu: float
    """The same with what is computed again counted too."""

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(stage.total for stage in self.stages)


def estimate(shape: Shape, layout: Layout, machine: Machine, habits: Habits = MEGAGROK) -> Estimate:
    """Bytes and seconds of one step. The layout has to be one that the model divides into (`check`, `search`)."""
    from megagrok.plan.stage_memory import stage_memory
    from megagrok.plan.step_time import step_seconds

    seconds = step_seconds(shape, layout, machine, habits)
    return Estimate(layout, stage_memory(shape, layout, habits), seconds, layout.tokens / seconds.total, 0.35, 0.35)
