"""The only file that knows CPU from GPU: device, collective backend, waiting, peak FLOP/s.

It is asked once, at start, and handed down. Importing it touches no device.
"""

import time
from dataclasses import dataclass

import torch

from megagrok.errors import MachineError
from megagrok.plan.gpus import gpu_of_device

_FP8_CAPABILITY = (8, 9)
_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Platform:
    """Where this rank computes. `backend` is the name torch.distributed knows it by."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """True where tensors live on an NVIDIA GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Return when all work queued on the device is done. Clocks are read after this."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        """The device in words, for reports."""
        if self.is_cuda:
            return f"{torch.cuda.get_device_name(self.device)}, CUDA {torch.version.cuda}"
        return f"CPU, {torch.get_num_threads()} thread(s) a rank"


CPU = Platform(torch.device("cpu"), "gloo")


def num_gpus() -> int:
    """GPUs that this machine shows; 0 without a driver."""
    return torch.cuda.device_count()


def find_platform(local_rank: int = 0) -> Platform:
    """The GPU numbered `local_rank` where there are GPUs, else the CPU. Asked once per process, before groups exist."""
    if not torch.cuda.is_available():
        return CPU
    if local_rank >= torch.cuda.device_count():
        raise MachineError(
            f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}. "
            f"Start at most {torch.cuda.device_count()} ranks per node."
        )
    torch.cuda.set_device(local_rank)
    return Platform(torch.device("cuda", local_rank), "nccl")


def check_precision(platform: Platform, precision: str) -> None:
    """Refuse a precision that this device or its libraries cannot do. Raises MachineError."""
    if precision == "fp32" or (precision == "bf16" and not platform.is_cuda):
        return
    if not platform.is_cuda:
        raise MachineError(
            "train.precision = fp8, needs an NVIDIA GPU of compute capability 8.9 or newer (Hopper: 9.0) with "
            "Transformer Engine; this machine computes on the CPU. Fix: train.precision=bf16 or fp32."
        )
    capability = torch.cuda.get_device_capability(platform.device)
    needed = _FP8_CAPABILITY if precision == "fp8" else _BF16_CAPABILITY
    if capability < needed:
        name, wider = torch.cuda.get_device_name(platform.device), "bf16" if precision == "fp8" else "fp32"
        raise MachineError(
            f"train.precision = {precision}, needs compute capability >= {needed[0]}.{needed[1]}; "
            f"{name} has {capability[0]}.{capability[1]}. Fix: train.precision={wider}."
        )


def peak_flops_per_second(platform: Platform, precision: str) -> float:
    """Peak of one rank: the data sheet's on a known GPU; on the CPU the rate of square fp32 matmuls over half a second.

    Ranks that share a CPU's cores call it at the same time: then their peaks add up to the machine's.

    Raises MachineError for a GPU that is not in the table: a wrong peak would make every MFU a lie.
    """
    if not platform.is_cuda:
        return measure_matmul_flops(platform, "fp32")
    return gpu_of_device(torch.cuda.get_device_name(platform.device)).peak(precision)


def measure_matmul_flops(platform: Platform, precision: str, seconds: float = 0.5) -> float:
    """FLOP/s that square matmuls reach on this rank over `seconds`, in fp32 or else in bf16.

    Ranks that share a CPU's cores, or a node's power, call it at the same time: then it is what they can have at most.
    """
    size = 8192 if platform.is_cuda else 512
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a = torch.ones(size, size, device=platform.device, dtype=dtype)
    a @ a
    platform.wait()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        a @ a
        platform.wait()
        count += 1
    return float(2 * size**3 * count / elapsed)
