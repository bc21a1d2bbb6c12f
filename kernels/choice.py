"""Which implementation of an operation runs: a name, looked at once, when a model is built.

`auto` is the fastest that was measured on that kind of device (docs/bench/kernels.md). On a GPU nothing was measured
yet, so there it is torch, whose code the tests and the rehearsal run as well.
"""

from dataclasses import asdict
from importlib.util import find_spec

import torch

from megagrok.config.schema import KernelsConfig
from megagrok.errors import KernelError

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("torch", "triton"),
    "cross_entropy": ("torch", "triton"),
    "experts": ("torch", "grouped_mm", "triton"),
    "norm": ("torch", "triton"),
    "permute": ("torch", "triton"),
    "router": ("torch", "triton"),
}
"""Of each operation; `auto` besides."""

AUTO: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(IMPLEMENTATIONS, "torch"),
    "cuda": dict.fromkeys(IMPLEMENTATIONS, "torch"),
}
"""Device type -> operation -> what `auto` means there."""


def choose(op: str, wanted: str, device: torch.device) -> str:
    """Name of the implementation. Raises KernelError for one that is not there or that this machine cannot run."""
    known = IMPLEMENTATIONS[op]
    if wanted == "auto":
        return AUTO[device.type][op]
    if wanted not in known:
        raise KernelError(f"kernels.{op} = {wanted}, which it has not; it has auto, {', '.join(known)}.")
    if wanted == "triton" and find_spec("triton") is None:
        raise KernelError(f"kernels.{op} = triton, but triton is not installed. Fix: pip install triton, or auto.")
    if wanted == "triton" and device.type != "cuda" and not _interprets():
        raise KernelError(
            f"kernels.{op} = triton, which needs an NVIDIA GPU; the device is {device.type}. Fix: kernels.{op}=auto, "
            "or TRITON_INTERPRET=1 to check results slowly."
        )
    return wanted


def check_kernels(names: KernelsConfig, device: torch.device) -> None:
    """Refuse what `choose` refuses, before anything is built. Raises KernelError."""
    for op, wanted in asdict(names).items():
        choose(op, wanted, device)


def _interprets() -> bool:
    """True where Triton runs its kernels in Python, on any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
