"""The experts' races, without router and dispatch: each implementation, a loop of modules, and the matmuls alone."""
# N rows of x, R rows (one per choice of a token), e experts, D hidden, F expert width

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.experts import Experts, choose_experts
from megagrok.kernels.experts.reference import mix_experts as one_after_the_other
from megagrok.kernels.layer_case import LayerShape, make_values, plain_matmuls
from megagrok.kernels.timing import Case, Run

# The layer's: few wide experts and many narrow ones; Grok-2's width is that of one of eight tensor ranks.
CPU_SHAPES = (LayerShape(4096, 512, 8, 2, 1024), LayerShape(4096, 512, 64, 8, 128))
GPU_SHAPES = (LayerShape(24576, 1536, 128, 8, 256), LayerShape(8192, 8192, 8, 2, 2720))
LOOP = "a loop with autograd"
FLOOR = "plain matmuls"


def contenders(device: torch.device) -> list[Case]:
    """Even routing; fp32 on a CPU and bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cases = []
    for shape in GPU_SHAPES if on_gpu else CPU_SHAPES:
        experts = {
            name: choose_experts(name, device) for name in IMPLEMENTATIONS["experts"] if on_gpu or name != "triton"
        }
        experts[LOOP] = one_after_the_other
        makes: dict[str, Callable[[], Run]] = {
            name: partial(_make, mix, shape, device, dtype) for name, mix in experts.items()
        }
        makes[FLOOR] = partial(_make_floor, shape, device, dtype)
        least_bytes = shape.least_bytes(dtype.itemsize)
        cases.append(Case("experts", shape.in_words(), shape.expert_flops, least_bytes, makes))
    return cases


def _make(mix: Experts, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Run:
    values = make_values(shape, device, dtype)
    x_ND = values.x_TD.requires_grad_()
    gate_up_eFD, down_eDF = nn.Parameter(values.gate_up_EFD), nn.Parameter(values.down_EDF)
    source_R, rows_per_expert = _even_routing(shape, device)
    weight_R = torch.rand(len(source_R), device=device, requires_grad=True)

    def run() -> None:
        x_ND.grad = weight_R.grad = gate_up_eFD.grad = down_eDF.grad = None
        y_ND = mix(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)
        torch.autograd.backward(y_ND, values.grad_TD)

    return run


def _make_floor(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Run:
    return plain_matmuls(make_values(shape, device, dtype))


def _even_routing(shape: LayerShape, device: torch.device) -> tuple[Tensor, list[int]]:
    """Token t visits experts t, t + 1, ... modulo their number."""
    token_TK = torch.arange(shape.tokens)[:, None].expand(-1, shape.top_k)
    expert_TK = (token_TK + torch.arange(shape.top_k)) % shape.num_experts
    order_R = expert_TK.flatten().argsort(stable=True)
    rows_per_expert = expert_TK.flatten().bincount(minlength=shape.num_experts).tolist()
    return (order_R // shape.top_k).to(device), rows_per_expert
