"""The GPUs that a plan knows: peaks, memory, links, power, each with its source. Not how much of a peak is reached.

One table for planner, bench and trainer: an MFU is only as honest as the peak below it, so a GPU that is not here is
refused, never assumed.
"""

from dataclasses import dataclass

from megagrok.errors import MachineError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Rates are per second, dense (no sparsity), links in one direction."""

    name: str
    """Its name on the command line."""
    marks: tuple[str, ...]
    """Parts of the name that the driver reports, all of which this GPU has."""
    bf16_flops: float
    fp8_flops: float
    """0 if it has no FP8 units."""
    memory_bytes: int
    memory_bandwidth: float
    nvlink_bandwidth: float
    """To the other GPUs of its node, all links together."""
    network_bandwidth: float
    """Of its own network port, as its reference server has it; a cluster may have less."""
    power_watts: int
    """Of the board at most; a server draws more (`megagrok.plan.price`)."""
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s at a training precision; fp32 training runs its matmuls in TF32, at half of bf16."""
        return {"fp8": self.fp8_flops, "bf16": self.bf16_flops, "fp32": self.bf16_flops / 2}[precision]


GB = 10**9
_SXM = "NVIDIA H100 data sheet 2023, HGX H100: 4 x NDR 400 Gb/s per 4 GPUs"
GPUS = (
    Gpu("h100", ("H100",), 989.4e12, 1978.9e12, 81_559 * 2**20, 3.35e12, 450e9, 50e9, 700, _SXM),
    Gpu("h100-pcie", ("H100", "PCIe"), 756e12, 1513e12, 80 * 2**30, 2.0e12, 64e9, 50e9, 350, "NVIDIA H100 data sheet"),
    Gpu("h100-nvl", ("H100", "NVL"), 835e12, 1671e12, 94 * GB, 3.9e12, 300e9, 50e9, 400, "NVIDIA H100 NVL data sheet"),
    Gpu("h200", ("H200",), 989.4e12, 1978.9e12, 141 * GB, 4.8e12, 450e9, 50e9, 700, "NVIDIA H200 data sheet"),
    Gpu("h800", ("H800",), 989.4e12, 1978.9e12, 80 * 2**30, 3.35e12, 200e9, 50e9, 700, "arXiv:2412.19437, sec. 3.1"),
    Gpu("a100", ("A100",), 312e12, 0.0, 80 * 2**30, 2.04e12, 300e9, 25e9, 400, "NVIDIA A100 data sheet, 80 GB SXM"),
    Gpu("b200", ("B200",), 2250e12, 4500e12, 180 * GB, 7.7e12, 900e9, 50e9, 1000, "NVIDIA HGX B200 data sheet"),
)


def find_gpu(name: str) -> Gpu:
    """By its name on the command line. Raises MachineError for one that is not in the table."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise _unknown(name)


def gpu_of_device(device_name: str) -> Gpu:
    """By the name that its driver reports, "NVIDIA H100 80GB HBM3". Raises MachineError for an unknown one."""
    fitting = [gpu for gpu in GPUS if all(mark in device_name for mark in gpu.marks)]
    if not fitting:
        raise _unknown(device_name)
    return max(fitting, key=lambda gpu: len(gpu.marks))


def _unknown(name: str) -> MachineError:
    known = ", ".join(gpu.name for gpu in GPUS)
    return MachineError(
        f"no peak FLOP/s known for the GPU {name!r}; known: {known}. A peak is not assumed: add it to plan/gpus.py."
    )
