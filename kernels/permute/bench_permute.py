"""The races of permute and unpermute: each implementation, and indexing with autograd as models write it.

No FLOPs to speak of: what it costs is rows moved.
"""
# T tokens, K top-k, R = T * K rows, D hidden

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.permute import Permute, choose_permute
from megagrok.kernels.timing import Case, Run

# Tokens, hidden, top-k.
CPU_SHAPES = ((512, 192, 2), (4096, 512, 2), (4096, 512, 8))
GPU_SHAPES = ((24576, 1536, 8), (32768, 4096, 4), (8192, 8192, 2), (32768, 8192, 2))
PEER = "indexing with autograd"


def contenders(device: torch.device) -> list[Case]:
    """Both directions, each forward and backward, unpermute with weights; fp32 on a CPU and bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    names = [name for name in IMPLEMENTATIONS["permute"] if on_gpu or name != "triton"]
    pairs = {name: choose_permute(name, device) for name in names} | {PEER: Permute(_permute, _unpermute)}
    cases = []
    for tokens, hidden, top_k in GPU_SHAPES if on_gpu else CPU_SHAPES:
        token_bytes = tokens * hidden * (2 if on_gpu else 4)
        row_bytes = top_k * token_bytes
        for makes, words, least_bytes in (
            # A token's row is read and its K copies written; backward the other way.
            (_make_permute, "permute", 2 * (token_bytes + row_bytes)),
            # Backward reads the rows too, for the weights' gradient.
            (_make_unpermute, "unpermute", 2 * (token_bytes + row_bytes) + row_bytes),
        ):
            runs = {name: partial(makes, pair, tokens, hidden, top_k, device) for name, pair in pairs.items()}
            cases.append(Case("permute", f"{words}: {tokens} x {hidden}, top-{top_k}", 0.0, float(least_bytes), runs))
    return cases


def _make_permute(pair: Permute, tokens: int, hidden: int, top_k: int, device: torch.device) -> Run:
    token_R, inverse_TK = _routing(tokens, top_k, device)
    x_TD = _randn(tokens, hidden, device).requires_grad_()
    gradient_RD = _randn(len(token_R), hidden, device)

    def run() -> None:
        x_TD.grad = None
        torch.autograd.backward(pair.permute(x_TD, token_R, inverse_TK), gradient_RD)

    return run


def _make_unpermute(pair: Permute, tokens: int, hidden: int, top_k: int, device: torch.device) -> Run:
    token_R, inverse_TK = _routing(tokens, top_k, device)
    rows_RD = _randn(len(token_R), hidden, device).requires_grad_()
    weights_TK = torch.rand(tokens, top_k, device=device, requires_grad=True)
    gradient_TD = _randn(tokens, hidden, device)

    def run() -> None:
        rows_RD.grad = weights_TK.grad = None
        torch.autograd.backward(pair.unpermute(rows_RD, inverse_TK, weights_TK), gradient_TD)

    return run


def _randn(rows: int, hidden: int, device: torch.device) -> Tensor:
    return torch.randn(rows, hidden, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def _routing(tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in random order: no expert's tokens lie together."""
    inverse_R = torch.randperm(tokens * top_k, device=device)
    return inverse_R.argsort() // top_k, inverse_R.view(tokens, top_k)


def _permute(x_TD: Tensor, token_R: Tensor, inverse_TK: Tensor | None = None) -> Tensor:
    return F.embedding(token_R, x_TD)


def _unpermute(rows_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    rows_TKD = rows_RD[inverse_TK]
    return (rows_TKD if weights_TK is None else rows_TKD * weights_TK[..., None].to(rows_TKD.dtype)).sum(dim=1)
