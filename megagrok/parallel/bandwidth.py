"""How fast an all-reduce goes between the processes that srun started: a measurement before a run, not a benchmark.

The one idea: what a step waits for is the slowest rank, so the number of the slowest is the answer.
"""

import statistics
import time

import torch
import torch.distributed as dist

from megagrok.parallel.launch import join
from megagrok.parallel.placement import Placement
from megagrok.platform import find_platform

_REPEATS, _WARM_UP = 5, 2
# Large enough that the time is in the transfer and not in the latency.
_GPU_BYTES, _CPU_BYTES = 1 << 28, 1 << 24
_TIMEOUT_SECONDS = 120.0


def measure_bandwidth(placement: Placement) -> float:
    """Bus bandwidth in GB/s: bytes of the buffer per second, times 2 (n - 1) / n, as NCCL's tests count it.

    Collective: every process of `placement.world_size` calls it, once. Raises MachineError if they do not meet.
    Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
    """
    platform = find_platform(placement.local_rank)
    device = platform.device if platform.is_cuda else None
    ranks = join(placement, backend=platform.backend, timeout_seconds=_TIMEOUT_SECONDS, device=device)
    num_bytes = _GPU_BYTES if platform.is_cuda else _CPU_BYTES
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=platform.device)
    seconds = []
    for repeat in range(_WARM_UP + _REPEATS):
        ranks.barrier()
        platform.wait()
        begin = time.perf_counter()
        dist.all_reduce(buffer)
        platform.wait()
        if repeat >= _WARM_UP:
            seconds.append(time.perf_counter() - begin)
    slowest = max(float(str(other)) for other in ranks.gather(statistics.median(seconds)))
    dist.destroy_process_group()
    share = 2 * (placement.world_size - 1) / placement.world_size
    return num_bytes * share / slowest / 1e9
