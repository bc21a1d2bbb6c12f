"""RMSNorm's races: each implementation, and torch's own as a model would call it.

Its few FLOPs are free: memory traffic is all that it costs.
"""
# T tokens, D hidden

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.norm import choose_norm
from megagrok.kernels.timing import Case, Run

EPS = 1e-5
CPU_SHAPES = ((512, 192), (4096, 512), (4096, 1024))
GPU_SHAPES = ((24576, 1536), (32768, 4096), (8192, 8192), (32768, 8192))
PEER = "torch's rms_norm"

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of residual, x and gain."""


def contenders(device: torch.device) -> list[Case]:
    """Alone and added to a residual, fp32 on a CPU and bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    names = [name for name in IMPLEMENTATIONS["norm"] if on_gpu or name != "triton"]
    cases = []
    for tokens, hidden in GPU_SHAPES if on_gpu else CPU_SHAPES:
        size = tokens * hidden * (2 if on_gpu else 4)
        for is_added in (False, True):
            makes = {name: partial(_make, _ours(name, device, is_added), tokens, hidden, device) for name in names}
            makes[PEER] = partial(_make, _added_by_torch if is_added else _by_torch, tokens, hidden, device)
            words = f"{tokens} x {hidden}{', added to a residual' if is_added else ''}"
            # Forward x and y, backward gradient, x and its gradient; the residual is read, and its gradient is there.
            cases.append(Case("norm", words, 0.0, (6.0 if is_added else 5.0) * size, makes))
    return cases


def _make(norm: Norm, tokens: int, hidden: int, device: torch.device) -> Run:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    residual, x, gradient = (torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(3))
    gain = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))
    residual.requires_grad_()
    x.requires_grad_()

    def run() -> None:
        residual.grad = x.grad = gain.grad = None
        torch.autograd.backward(norm(residual, x, gain), gradient)

    return run


def _ours(name: str, device: torch.device, is_added: bool) -> Norm:
    norm = choose_norm(name, device)
    if is_added:
        return lambda residual, x, gain: norm.add_rms_norm(residual, x, gain, EPS)
    return lambda _residual, x, gain: norm.rms_norm(x, gain, EPS)


def _by_torch(_residual: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x.float(), gain.shape, gain.float(), EPS).to(x.dtype)


def _added_by_torch(residual: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    return residual + _by_torch(residual, x, gain)
