"""The words in which a layout's cost is told: the machine, bytes of a stage, seconds of a step. No formulas."""

from dataclasses import astuple, dataclass

from megagrok.plan.gpus import Gpu
from megagrok.plan.shape import Layout


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
        # Not astuple, which takes longer than the rest of an estimate of memory.
        state = self.weights + self.gradients + self.optimizer
        working = self.activations + self.transient + self.logits + self.imbalance
        return state + working + self.communication + self.reserve


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
    """A layout's cost on a machine."""

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
