"""What this machine can do at most, measured: FLOP/s of large square matmuls, bytes/s of a large copy."""

from dataclasses import dataclass

import torch

from megagrok.kernels.timing import Case, seconds_of
from megagrok.platform import Platform, measure_matmul_flops

_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Far beyond any cache."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Of one device, all threads or the whole GPU."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, case: Case) -> float:
        """No implementation can be faster: the slower of its matmuls alone and its memory traffic alone."""
        return max(case.flops / self.flops_per_second, case.bytes / self.bytes_per_second)


def measure_roofline(platform: Platform, *, copied_bytes: int | None = None, seconds: float = 1.0) -> Roofline:
    """In the precision that the cases have: bf16 on a GPU, fp32 on a CPU. The best of ten copies counts."""
    precision = "bf16" if platform.is_cuda else "fp32"
    size = copied_bytes or _COPIED_BYTES[platform.device.type]
    source = torch.ones(size, dtype=torch.uint8, device=platform.device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    # A copy reads and writes.
    bytes_per_second = 2 * size / min(seconds_of(copy, platform) for _ in range(10))
    return Roofline(measure_matmul_flops(platform, precision, seconds), bytes_per_second)
