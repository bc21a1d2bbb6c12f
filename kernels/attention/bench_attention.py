"""Attention's races on a CPU: each implementation, and whole scores as a model without a kernel writes them.

On a GPU the shapes are Grok-2's and the peers other libraries' kernels: bench_cases.py.
"""
# s positions, b micro-batch, h query heads, g kv heads, c head width

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megagrok.kernels.attention import choose_attention
from megagrok.kernels.attention.reference import attention as reference
from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.timing import Case, Run

# Positions, batch, query heads, kv heads, head width: the first is quickstart's.
CPU_SHAPES = ((128, 4, 6, 2, 32), (512, 2, 8, 2, 64), (2048, 1, 8, 2, 64))
CAPS = (30.0, None)
WHOLE, FUSED = "whole scores", "torch sdpa"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q [s, b, h, c], k and v [s, b, g, c]."""


def contenders(device: torch.device) -> list[Case]:
    """fp32, with Grok's cap and without; only without does torch have a fused kernel."""
    if device.type == "cuda":
        return []
    cases = []
    for s, b, h, g, c in CPU_SHAPES:
        for cap in CAPS:
            names = [name for name in IMPLEMENTATIONS["attention"] if name != "triton"]
            attends: dict[str, Attend] = {name: partial(choose_attention(name, device), cap=cap) for name in names}
            attends[WHOLE] = partial(reference, cap=cap)
            if cap is None:
                attends[FUSED] = _fused
            makes = {name: partial(_make, attend, s, b, h, g, c) for name, attend in attends.items()}
            words = f"{s} positions x {b}, {h} query and {g} kv heads of {c}, "
            words += "no cap" if cap is None else f"cap {cap:g}"
            cases.append(Case("attention", words, causal_flops(b, h, s, c), 0.0, makes))
    return cases


def causal_flops(batch: int, heads: int, positions: int, width: int) -> float:
    """Forward and backward, as FlashAttention's figures count: two and five matmuls over the causal half."""
    return 7.0 * 2 * batch * heads * positions**2 / 2 * width


def _make(attend: Attend, s: int, b: int, h: int, g: int, c: int) -> Run:
    q, k, v = (torch.randn(s, b, heads, c, requires_grad=True) for heads in (h, g, g))
    gradient = torch.randn(s, b, h * c)

    def run() -> None:
        q.grad = k.grad = v.grad = None
        torch.autograd.backward(attend(q, k, v), gradient)

    return run


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed.permute(2, 0, 1, 3).flatten(-2)
