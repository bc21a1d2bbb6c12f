"""One table of GPUs, by the names that people type and that drivers report; what is not in it is refused."""

import re

import pytest

from megagrok.errors import MachineError
from megagrok.plan.gpus import GPUS, find_gpu, gpu_of_device

DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


@pytest.mark.parametrize("device", DEVICES)
def test_the_name_that_a_driver_reports_finds_its_gpu(device: str) -> None:
    assert gpu_of_device(device).name == DEVICES[device]


def test_every_gpu_of_the_table_is_found_by_a_name_of_its_driver() -> None:
    assert set(DEVICES.values()) == {gpu.name for gpu in GPUS}


@pytest.mark.parametrize(
    "device",
    ["NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop", "Tesla T4", "A100"],
)
def test_what_only_resembles_a_known_gpu_is_refused_and_not_assumed(device: str) -> None:
    with pytest.raises(MachineError, match=re.escape(f"no peak FLOP/s known for the GPU {device!r}")):
        gpu_of_device(device)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(MachineError, match="known: h100, h100-pcie.* A peak is not assumed"):
        find_gpu("v100")
    assert find_gpu("H100").name == "h100"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_rates_of_a_gpu_are_those_of_dense_arithmetic_in_one_direction(gpu) -> None:
    # fp8 twice bf16 to within rounding: a figure with sparsity would be four times.
    assert gpu.fp8_flops == 0 or gpu.fp8_flops / gpu.bf16_flops == pytest.approx(2, rel=0.02)
    assert gpu.peak("fp32") < gpu.peak("bf16")
    assert gpu.network_bandwidth <= gpu.nvlink_bandwidth < gpu.memory_bandwidth
    assert gpu.source
