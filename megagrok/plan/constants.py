"""Every constant of the time model, each with a source or a fit. No constant belongs to a model or to one run.

The fit: benchmarks/published_runs.py, which also says how well runs that were left out are predicted.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Rates are shares of a data sheet's peak; times are seconds."""

    matmul_bf16: float = 0.72
    """Of the bf16 peak, for a matmul so large that only arithmetic counts. Best shape: 0.80 (MAMF, ml-engineering)."""
    matmul_fp8: float = 0.60
    """Of the fp8 peak. Best shape: 0.71 (same)."""
    matmul_traffic: float = 1.0
    """Times that a matmul's operands and result cross the memory."""
    expert_matmul: float = 0.85
    """Of a large matmul's rate, for a grouped one."""
    attention: float = 0.45
    """Of the bf16 peak, forward and backward together; FlashAttention-3 and cuDNN: 0.5 to 0.6 forward."""
    memory: float = 0.80
    """Of the memory's bandwidth."""
    moved: float = 1.0
    """Times that fused element-wise work crosses the memory, over the least."""
    eager: float = 2.5
    """The same for one torch call per operation, over fused."""
    cast_fp8: float = 3.0
    """Bytes of scaling and casting for each element that enters an fp8 matmul."""
    launch: float = 6e-6
    """Per kernel, on the host."""
    nvlink: float = 0.65
    """Of the link's bandwidth, collectives of large tensors."""
    network: float = 0.65
    """Of the port's bandwidth."""
    nvlink_latency: float = 8e-6
    """Per collective and doubling of ranks within a node."""
    network_latency: float = 20e-6
    """Per collective and doubling of nodes."""
    tensor_hidden: float = 0.5
    """Share of tensor-parallel messages behind matmuls, where the trainer overlaps them."""
    expert_hidden: float = 0.6
    data_hidden: float = 0.7
    straggler: float = 0.01
    """Of the step, per doubling of nodes: the slowest rank is waited for."""
    natural: float = 0.25
    """Extra rows of the fullest expert rank under natural routing."""
    step: float = 0.02
    """Seconds of a step that no other part has: host, clipping, logging."""


CONSTANTS = Constants()
