"""Every constant of the planner, each with a source, a fit, or the word that it is an estimate. None belongs to a model
or to one run. Not here: GPUs (gpus.py), failures (failures.py) and the speed of saves (save_cost.py), which are tables.

"Fit" means: benchmarks/published_runs.py, which starts from the value that a source gives and is pulled back to it, so
that few runs cannot move it far; docs/plan/validation.md says how well runs that were left out are predicted.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Rates are shares of a data sheet's peak, hidden parts are shares of a message's time."""

    matmul_bf16: float = 0.719
    """Of the bf16 peak, where only arithmetic counts. Fit; from 0.72, 0.80 is the best of any shape (MAMF)."""
    matmul_fp8: float = 0.75
    """Of the fp8 peak. Fit; from 0.60, best shape 0.71 (MAMF). What it costs to cast is counted apart."""
    matmul_traffic: float = 0.704
    """Times that operands, results and gradient sums of a matmul cross the memory, not hidden. Fit; from 1."""
    expert_matmul: float = 0.862
    """Rate of a grouped matmul over a plain one. Fit; from 0.85."""
    attention: float = 0.439
    """Of the bf16 peak, both passes. Fit; from 0.45, FlashAttention-3 and cuDNN reach 0.53 to 0.6 forward."""
    older_attention: float = 0.314
    """The same of FlashAttention-2, which trainers without fused kernels call. Fit; from 0.31: 308 TFLOP/s at 8k."""
    triton_attention: float = 0.18
    """The same of megagrok's kernel with its cap. Never measured: predicted, docs/bench/kernels-h100-predicted.md."""
    memory: float = 0.801
    """Of the memory's bandwidth. Fit; from 0.8."""
    moved: float = 0.94
    """Bytes of fused element-wise work over those of `work.py`. Fit; from 1."""
    eager: float = 2.35
    """The same for one torch call per operation, over fused. Fit; from 2.5."""
    cast_fp8: float = 2.15
    """Bytes of scaling and casting for each element of an fp8 matmul. Fit; from 3: read 2, write 1."""
    launch: float = 2.24e-05
    """Seconds of the host per kernel. Fit; from 19e-6, 11 to 18e-6 for the launch alone (dgxc-benchmarking)."""
    launch_fp8: float = 1.0
    """The same under fp8, over bf16: scales and casts are kernels too. Fit; from 1.5."""
    graphed: float = 0.5
    """Host time that is left where CUDA graphs replay a part of the layer. Fit; from 0.5."""
    nvlink: float = 0.707
    """Of the links' bandwidth, large collectives. Fit; from 0.65."""
    network: float = 0.799
    """Of a port's bandwidth. Fit; from 0.65, 0.85 for large messages of one ring."""
    network_fall: float = 0.0178
    """A port's rate falls with the number of nodes to this power. Fit; from 0.02."""
    rails: float = 0.804
    """A ring's rate between nodes grows with its ranks in a node to this power. Fit; from 0.8."""
    exchange: float = 0.869
    """Rate of an all-to-all over that of a ring. Fit; from 0.8."""
    nvlink_latency: float = 7.94e-06
    """Seconds per collective and doubling of ranks within a node. Fit; from 8e-6."""
    network_latency: float = 1.99e-05
    """Seconds per collective and doubling of nodes. Fit; from 20e-6."""
    hop: float = 0.000101
    """Seconds between two pipeline stages, besides the bytes. Fit; from 1e-4."""
    interleaved_hop: float = 0.2
    """Share of hops that is waited for where chunks interleave: they travel while others compute. Assumed."""
    tensor_hidden: float = 0.579
    """Behind matmuls, where the trainer overlaps them. Fit; from 0.5."""
    context_hidden: float = 0.7
    """Behind attention, where the trainer sends keys around a ring. Assumed."""
    expert_hidden: float = 0.534
    """Behind other micro-batches, where the trainer overlaps them. Fit; from 0.6."""
    data_hidden: float = 0.675
    """Behind the last backward pass, where the trainer overlaps them. Fit; from 0.7."""
    straggler: float = 0.00972
    """Of the step, per doubling of nodes: the slowest rank is waited for. Fit; from 0.01."""
    natural: float = 0.246
    """Of the experts' time and messages, more on the fullest rank if routing is not forced. Fit; from 0.25."""
    update: float = 53.3
    """Bytes that the optimizer moves for each parameter of a rank's shard. Fit; from 40."""
    step: float = 0.0278
    """Seconds that no other part has: data, clipping, logging. Fit; from 0.02."""


CONSTANTS = Constants()

CONTEXT_BYTES = 1_500_000_000
"""CUDA context, cuBLAS and NCCL's buffers: 1 to 3 GB lie beside what torch allocates. An estimate."""
SLACK = 0.10
"""Of activations and working memory: 0.04 that the allocator holds and cannot give out, an estimate; and 0.06, about
what rehearsals of the 286 B model under full recomputation find beyond what is planned here (5 to 7 %)."""
EXPERT_SPREAD = 0.40
"""Standard deviation of one expert's load over the mean load, natural routing under an auxiliary loss. An estimate: the
fullest of 64 experts had 1.94 times the mean (MaxVio 0.937, softmax gate with auxiliary loss, 1 B parameters, 100 B
tokens: Wang et al. 2024, arXiv:2408.15664, table of the softmax gates), and the largest of 64 normals is 2.36
deviations out. Routers balanced without a loss, by bias, come to a tenth of it."""
SERVER_FACTOR = 10_200 / (8 * 700)
"""Watts of a whole server per watt of its GPU boards: DGX H100, 10.2 kW at most with eight of 700 W (user guide)."""
PUE = 1.56
"""Watts of the site per watt of its servers: mean of Uptime Institute's survey of 2024. New halls: 1.1 to 1.3."""
