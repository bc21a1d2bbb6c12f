"""What a measurement was taken on: device, versions, commit, sizes, and how busy others kept the machine."""

import importlib.metadata
import os
import platform as this_machine
import subprocess
from pathlib import Path

import torch

from megagrok.config import RunConfig
from megagrok.parallel.launch import count_gpus

_LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers")


def describe_machine(load_before: float) -> dict[str, object]:
    """Facts that a number means nothing without. `load_before`: os.getloadavg()[0] before anything was started."""
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "device": _device(),
        "versions": {"python": this_machine.python_version(), **_versions()},
        # Of the minute before: above a fraction of the cores, trust CPU seconds more than the clock.
        "load_before": f"{load_before:.1f}",
        "commit": described.stdout.strip() or "unknown",
    }


def describe_shapes(run: RunConfig) -> dict[str, object]:
    """Sizes that decide the cost of a step."""
    model, train, parallel = run.model, run.train, run.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    return {
        "hidden": model.hidden,
        "layers": model.num_layers,
        "heads": f"{model.num_heads} query, {model.num_kv_heads} key-value, width {model.head_dim}",
        "experts": f"{model.moe.num_experts}, top {model.moe.top_k}, width {model.moe.ffn_hidden}",
        "vocabulary": model.vocab_size,
        "batch": f"{train.global_batch} samples of {train.seq_len} tokens, micro-batches of {train.micro_batch}",
        "layout": (
            f"tensor {parallel.tensor}{sequence}, context {parallel.context}, pipeline {parallel.pipeline}, "
            f"data {parallel.data}, experts over {parallel.expert}, ZeRO {parallel.zero}"
        ),
        "precision": f"{train.precision}, recompute {train.recompute}",
    }


def relative(path: Path) -> str:
    """Without the folder of whoever ran it."""
    resolved, root = path.resolve(), Path(__file__).resolve().parents[2]
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else resolved.name


def _device() -> str:
    if count_gpus():
        return f"{count_gpus()} GPU(s), CUDA {torch.version.cuda}, nccl"
    return (
        f"CPU, {this_machine.machine()}, {_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{len(os.sched_getaffinity(0))} cores, 1 thread a rank, gloo"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown model"
