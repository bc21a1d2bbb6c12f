"""CPU or GPU is decided in one place, and a precision that a device lacks is refused in one sentence."""

import os
import subprocess
import sys

import pytest
import torch

from megagrok.errors import MachineError
from megagrok.platform import Platform, check_precision, find_platform, peak_flops_per_second

CPU = Platform(torch.device("cpu"), "gloo")


def on_a_machine_without_gpus(code: str) -> str:
    """What a fresh process prints that CUDA hides every GPU from."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_gpus_ranks_compute_on_the_cpu_over_gloo() -> None:
    code = "from megagrok.platform import find_platform as f; p = f(7); print(p.device, p.backend, p.is_cuda)"
    assert on_a_machine_without_gpus(code) == "cpu gloo False"


def test_importing_the_platform_touches_no_device() -> None:
    code = "import torch, megagrok.platform; print(torch.cuda.is_initialized())"
    assert on_a_machine_without_gpus(code) == "False"


def test_a_cpu_describes_itself_and_has_nothing_to_wait_for() -> None:
    assert CPU.describe() == f"CPU, {torch.get_num_threads()} thread(s) a rank"
    CPU.wait()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_does_fp32_and_bf16(precision: str) -> None:
    check_precision(CPU, precision)


def test_fp8_on_a_cpu_is_refused_in_one_sentence_that_says_what_works() -> None:
    with pytest.raises(MachineError) as refused:
        check_precision(CPU, "fp8")
    text = str(refused.value)
    assert text.startswith("train.precision = fp8, needs an NVIDIA GPU")
    assert text.endswith("Fix: train.precision=bf16 or fp32.")
    assert "\n" not in text


def test_the_peak_of_a_cpu_is_measured() -> None:
    # A core does between a hundred million and ten trillion multiply-adds a second.
    assert 1e8 < peak_flops_per_second(CPU, "fp32") < 1e13


@pytest.mark.gpu
def test_a_gpu_is_found_named_and_has_a_peak() -> None:
    platform = find_platform(0)
    assert platform.is_cuda and platform.backend == "nccl"
    assert "CUDA" in platform.describe()
    check_precision(platform, "fp32")
    check_precision(platform, "bf16")
    assert peak_flops_per_second(platform, "bf16") > 1e14
    assert peak_flops_per_second(platform, "fp8") >= peak_flops_per_second(platform, "bf16")


@pytest.mark.gpu
def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(MachineError, match=f"local rank {found} has no GPU of its own: this node shows {found}"):
        find_platform(found)
