"""Cross-entropy's races: each implementation, whole logits as a model would write them, and its three matmuls alone.

Between the matmuls a GPU moves 10 bytes a logit (README.md), which is little beside them: the floor is FLOPs.
"""
# T tokens, D hidden, v rows of the vocabulary on this rank

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.cross_entropy import CrossEntropy, choose_cross_entropy
from megagrok.kernels.timing import Case, Run

MULTIPLIER, CAP = 0.5, 50.0
# Tokens, hidden, vocabulary: the last two are Grok-2's, on one of eight ranks and on one alone.
CPU_SHAPES = ((512, 192, 4096), (4096, 192, 4096), (2048, 512, 8192), (512, 512, 32768))
GPU_SHAPES = ((8192, 2048, 32768), (8192, 8192, 16384), (8192, 8192, 131072))
WHOLE = "whole logits"
FLOOR = "plain matmuls"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden, weight and labels."""


def contenders(device: torch.device) -> list[Case]:
    """fp32 on a CPU, bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    names = [name for name in IMPLEMENTATIONS["cross_entropy"] if on_gpu or name != "triton"]
    cases = []
    for tokens, hidden, width in GPU_SHAPES if on_gpu else CPU_SHAPES:
        losses: dict[str, Loss | None] = {name: _ours(choose_cross_entropy(name, device)) for name in names}
        losses |= {WHOLE: _whole, FLOOR: None}
        makes = {name: partial(_make, loss, tokens, hidden, width, device) for name, loss in losses.items()}
        words = f"{tokens} tokens, hidden {hidden}, vocabulary {width}"
        cases.append(Case("cross_entropy", words, 6.0 * tokens * hidden * width, 0.0, makes))
    return cases


def _make(loss: Loss | None, tokens: int, hidden: int, width: int, device: torch.device) -> Run:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=loss is not None)
    weight_vD = nn.Parameter(torch.randn(width, hidden, device=device, dtype=dtype) * 0.1)
    labels_T = torch.randint(width, (tokens,), device=device)

    def run() -> None:
        hidden_TD.grad = weight_vD.grad = None
        if loss is None:
            with torch.no_grad():
                logits_Tv = hidden_TD @ weight_vD.t()
                torch.mm(logits_Tv, weight_vD)
                torch.mm(logits_Tv.t(), hidden_TD)
        else:
            torch.autograd.backward(loss(hidden_TD, weight_vD, labels_T))

    return run


def _ours(cross_entropy: CrossEntropy) -> Loss:
    def loss(hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor) -> Tensor:
        return cross_entropy(hidden_TD, weight_vD, labels_T, multiplier=MULTIPLIER, cap=CAP, group=None, first_token=0)[
            0
        ]

    return loss


def _whole(hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor) -> Tensor:
    logits_Tv = torch.tanh(F.linear(hidden_TD, weight_vD).float() * (MULTIPLIER / CAP)) * CAP
    return F.cross_entropy(logits_Tv, labels_T, reduction="sum")
