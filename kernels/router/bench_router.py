"""The router's races: each implementation, and the definition in plain torch with autograd, as models have it."""
# T tokens, D hidden, E experts, K top-k

from functools import partial

import torch
from torch import nn

from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.router import Router, choose_router, reference
from megagrok.kernels.timing import Case, Run

CAP = 30.0
CPU_SHAPES = ((512, 192, 8, 2), (4096, 512, 8, 2), (4096, 512, 64, 8))
GPU_SHAPES = ((24576, 1536, 128, 8), (32768, 4096, 64, 4), (8192, 8192, 8, 2), (32768, 8192, 8, 2))
PEER = "plain torch"


def contenders(device: torch.device) -> list[Case]:
    """softmax, soft-capped, with all three gradients; x in fp32 on a CPU and in bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    cases = []
    for tokens, hidden, experts, top_k in GPU_SHAPES if on_gpu else CPU_SHAPES:
        routers: dict[str, Router] = {
            name: choose_router(name, device) for name in IMPLEMENTATIONS["router"] if on_gpu or name != "triton"
        }
        routers[PEER] = reference.route
        makes = {name: partial(_make, route, tokens, hidden, experts, top_k, device) for name, route in routers.items()}
        # x is read twice and its gradient written; the matmul of logits, and two of its gradients.
        size, flops = tokens * hidden * (2 if on_gpu else 4), 3 * 2.0 * tokens * hidden * experts
        words = f"{tokens} tokens, hidden {hidden}, {experts} experts, top-{top_k}"
        # In fp32 the FLOPs of a GPU are not its bf16 matmuls': only the bytes are its roofline.
        cases.append(Case("router", words, 0.0 if on_gpu else flops, 3.0 * size, makes))
    return cases


def _make(route: Router, tokens: int, hidden: int, experts: int, top_k: int, device: torch.device) -> Run:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_TD = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    weight_ED = nn.Parameter(torch.randn(experts, hidden, device=device, dtype=dtype) * hidden**-0.5)
    gradients = [torch.randn(shape, device=device) for shape in ((tokens, top_k), (experts,), ())]

    def run() -> None:
        x_TD.grad = weight_ED.grad = None
        routed = route(x_TD, weight_ED, cap=CAP, top_k=top_k, scores="softmax", renormalize=False)
        torch.autograd.backward([routed.weights_TK, routed.probability_sum_E, routed.z_sum], gradients)

    return run
