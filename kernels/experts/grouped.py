"""The experts as torch's grouped matmuls: one call for all experts, around the same maths.

On a GPU of capability 9 and later in bf16 `torch._grouped_mm` is a CUTLASS kernel that takes ragged groups; on a CPU it
loops over them in torch, so there it only proves that this file is right. Nothing is fused: x is gathered whole, and
the activation has passes of its own.
"""

# N rows of x, R rows (one per choice of a token), e experts of this rank, D hidden, F expert width

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.experts.activation import gated_gelu, gated_gelu_gradients
from megagrok.kernels.experts.door import check_shapes
from megagrok.kernels.permute.torch_ops import gather_and_sum, rows_of_tokens


def mix_experts(
    x_ND: Tensor,
    source_R: Tensor,
    weight_R: Tensor,
    rows_per_expert: list[int],
    gate_up_eFD: Tensor,
    down_eDF: Tensor,
) -> Tensor:
    """`megagrok.kernels.experts.Experts`. D and F have to fill whole 16 bytes; on a GPU the dtype has to be bf16."""
    check_shapes(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)
    _, hidden, width = down_eDF.shape
    step = 16 // x_ND.element_size()
    if hidden % step or width % step:
        raise KernelError(
            f"experts: torch._grouped_mm takes rows of whole 16 bytes, got hidden {hidden} and width {width} in "
            f"{x_ND.dtype}. Fix: multiples of {step}, or kernels.experts=torch."
        )
    if x_ND.device.type != "cpu" and x_ND.dtype != torch.bfloat16:
        raise KernelError(
            f"experts: torch._grouped_mm takes bf16 on a GPU, got {x_ND.dtype}. Fix: kernels.experts=torch."
        )
    return _mixed(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)


class _MixExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        source_R: Tensor,
        weight_R: Tensor,
        rows_per_expert: list[int],
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        stops_e = torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32, device=x_ND.device)
        H_RF = _grouped(x_ND.index_select(0, source_R), gate_up_eFD.transpose(1, 2), stops_e)
        a_RF = H_RF.new_empty(len(H_RF), down_eDF.shape[2])
        gated_gelu(H_RF, weight_R[:, None], a_RF)
        y_RD = _grouped(a_RF, down_eDF.transpose(1, 2), stops_e)
        ctx.save_for_backward(x_ND, source_R, weight_R, gate_up_eFD, down_eDF, stops_e, H_RF)
        ctx.rows_per_expert = rows_per_expert
        return gather_and_sum(y_RD, rows_of_tokens(source_R, len(x_ND)), None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, source_R, weight_R, gate_up_eFD, down_eDF, stops_e, H_RF = ctx.saved_tensors
        dy_RD = grads[0].index_select(0, source_R)
        da_RF = _grouped(dy_RD, down_eDF, stops_e)
        a_RF, scratch_RF, dH_RF = torch.empty_like(da_RF), torch.empty_like(da_RF), torch.empty_like(H_RF)
        dweight_R = gated_gelu_gradients(H_RF, weight_R[:, None], da_RF, a_RF, dH_RF, scratch_RF)
        ddown_eDF = _weight_gradient(dy_RD, a_RF, stops_e, ctx.rows_per_expert)
        dgate_up_eFD = _weight_gradient(dH_RF, x_ND.index_select(0, source_R), stops_e, ctx.rows_per_expert)
        dx_RD = _grouped(dH_RF, gate_up_eFD, stops_e)
        dx_ND = gather_and_sum(dx_RD, rows_of_tokens(source_R, len(x_ND)), None)
        return dx_ND, None, dweight_R, None, dgate_up_eFD, ddown_eDF


_mixed: Callable[..., Tensor] = _MixExperts.apply


def _grouped(rows_RK: Tensor, weight_eKN: Tensor, stops_e: Tensor) -> Tensor:
    """Rows of each expert times its weight, [R, N]."""
    if len(rows_RK) == 0:
        return rows_RK.new_empty(0, weight_eKN.shape[2])
    return torch._grouped_mm(rows_RK, weight_eKN, offs=stops_e)


def _weight_gradient(left_RM: Tensor, right_RN: Tensor, stops_e: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Of each expert left^T right over its rows, [e, M, N]; zero without rows, which the kernel need not write."""
    if len(left_RM) == 0:
        return left_RM.new_zeros(len(rows_per_expert), left_RM.shape[1], right_RN.shape[1])
    gradient_eMN = torch._grouped_mm(left_RM.t(), right_RN, offs=stops_e)
    for expert, rows in enumerate(rows_per_expert):
        if rows == 0:
            gradient_eMN[expert].zero_()
    return gradient_eMN
