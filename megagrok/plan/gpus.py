"""The GPUs that a plan knows: peaks, memory, links, power, each with its source. Not how much of a peak is reached.

One table for planner, bench and trainer: an MFU is only as honest as the peak below it, so a GPU that is not here is
refused, never assumed.
"""

import re
from dataclasses import dataclass

from megagrok.errors import MachineError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Rates are per second, dense (no sparsity), links in one direction."""

    name: str
    """Its name on the command line."""
    marks: tuple[str, ...]
    """Words of the name that its driver reports, in capitals; this GPU has all of them."""
    fp32_flops: float
    """Without tensor cores: torch keeps TF32 off unless it is asked, and megagrok does not ask."""
    bf16_flops: float
    fp8_flops: float
    """0 if it has no FP8 units."""
    memory_bytes: int
    memory_bandwidth: float
    nvlink_bandwidth: float
    """To the other GPUs of its node, all links together; that of its PCIe slot where it has no NVLink to all."""
    network_bandwidth: float
    """Of its own network port, as its reference server has it; a cluster may have less."""
    power_watts: int
    """Of the board at most; a server draws more (`megagrok.plan.price`)."""
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s at a training precision."""
        return {"fp8": self.fp8_flops, "bf16": self.bf16_flops, "fp32": self.fp32_flops}[precision]


GIB = 2**30
NOT_WHOLE = frozenset(("MIG", "LAPTOP"))
"""Words of a device that is less than the GPU whose name it bears."""

# Memory is what torch reports as the capacity of the device, the least of several drivers' figures: less than the board
# carries, and what a run can have. Arithmetic is without sparsity, at the clocks of the data sheet.
GPUS = (
    Gpu(
        "h100", ("H100",), 66.9e12, 989.4e12, 1978.9e12, int(79.1 * GIB), 3.35e12, 450e9, 50e9, 700,
        "NVIDIA H100 data sheet, SXM5 80 GB; DGX H100: one 400 Gb/s port per GPU",
    ),
    Gpu(
        "h100-pcie", ("H100", "PCIE"), 51.2e12, 756e12, 1513e12, int(79.1 * GIB), 2.0e12, 64e9, 50e9, 350,
        "NVIDIA H100 data sheet, PCIe 80 GB; PCIe 5.0 x16 between GPUs, no NVLink bridge",
    ),
    Gpu(
        "h100-nvl", ("H100", "NVL"), 60e12, 835e12, 1671e12, int(93.0 * GIB), 3.9e12, 300e9, 50e9, 400,
        "NVIDIA H100 NVL data sheet, 94 GB; NVLink joins pairs only",
    ),
    Gpu(
        "h200", ("H200",), 66.9e12, 989.4e12, 1978.9e12, int(139.7 * GIB), 4.8e12, 450e9, 50e9, 700,
        "NVIDIA H200 data sheet, SXM 141 GB; DGX H200: one 400 Gb/s port per GPU",
    ),
    Gpu(
        "h800", ("H800",), 66.9e12, 989.4e12, 1978.9e12, int(79.1 * GIB), 3.35e12, 200e9, 50e9, 700,
        "as H100 SXM5 with 400 GB/s of NVLink, both directions: arXiv:2412.19437, section 3.1",
    ),
    Gpu(
        "a100", ("A100", "80GB"), 19.5e12, 312e12, 0.0, int(79.1 * GIB), 2.039e12, 300e9, 25e9, 400,
        "NVIDIA A100 data sheet, SXM4 80 GB; DGX A100: one 200 Gb/s port per GPU",
    ),
    Gpu(
        "a100-40", ("A100", "40GB"), 19.5e12, 312e12, 0.0, int(39.3 * GIB), 1.555e12, 300e9, 25e9, 400,
        "NVIDIA A100 data sheet, SXM4 40 GB; DGX A100: one 200 Gb/s port per GPU",
    ),
    Gpu(
        "a100-pcie", ("A100", "80GB", "PCIE"), 19.5e12, 312e12, 0.0, int(79.1 * GIB), 1.935e12, 32e9, 25e9, 300,
        "NVIDIA A100 data sheet, PCIe 80 GB; PCIe 4.0 x16 between GPUs, no NVLink bridge",
    ),
    Gpu(
        "b200", ("B200",), 75e12, 2250e12, 4500e12, int(178.3 * GIB), 7.67e12, 900e9, 50e9, 1000,
        "NVIDIA HGX B200 data sheet at 1000 W; bus width and clock as its driver reports them (pytorch/ao pull 4002)",
    ),
    Gpu(
        "gb200", ("GB200",), 80e12, 2500e12, 5000e12, int(184.3 * GIB), 8.0e12, 900e9, 50e9, 1200,
        "NVIDIA GB200 NVL72 data sheet, per GPU at 1200 W; a node is 4 GPUs, an NVLink domain up to 72",
    ),
    Gpu(
        "b300", ("B300",), 75e12, 2250e12, 4500e12, int(267.6 * GIB), 8.0e12, 900e9, 100e9, 1100,
        "NVIDIA HGX B300 data sheet; ConnectX-8: one 800 Gb/s port per GPU",
    ),
    Gpu(
        "l40s", ("L40S",), 91.6e12, 362e12, 733e12, int(44.3 * GIB), 0.864e12, 32e9, 25e9, 350,
        "NVIDIA L40S data sheet; PCIe 4.0 x16 between GPUs",
    ),
    Gpu(
        "rtx4090", ("RTX", "4090"), 82.6e12, 165.2e12, 330.3e12, int(23.5 * GIB), 1.008e12, 32e9, 12.5e9, 450,
        "NVIDIA Ada whitepaper, FP32 accumulation; PCIe 4.0 x16 between GPUs, a port of 100 Gb/s assumed",
    ),
)  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """By its name on the command line. Raises MachineError for one that is not in the table."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise _unknown(name)


def gpu_of_device(device_name: str) -> Gpu:
    """By the name that its driver reports, "NVIDIA H100 80GB HBM3". Raises MachineError for an unknown one.

    Marks are whole words: a GH200 is no H200. A slice of a GPU (MIG) has not the peak that its name suggests, and is
    unknown too.
    """
    words = re.findall(r"[A-Z0-9]+", device_name.upper())
    fitting = [gpu for gpu in GPUS if all(mark in words for mark in gpu.marks)]
    if not fitting or not NOT_WHOLE.isdisjoint(words):
        raise _unknown(device_name)
    return max(fitting, key=lambda gpu: len(gpu.marks))


def _unknown(name: str) -> MachineError:
    known = ", ".join(gpu.name for gpu in GPUS)
    return MachineError(
        f"no peak FLOP/s known for the GPU {name!r}; known: {known}. A peak is not assumed: add it to plan/gpus.py."
    )
