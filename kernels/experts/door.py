"""What every implementation of the experts asks of its arguments, said once."""

import torch
from torch import Tensor

from megagrok.errors import KernelError, ShapeError


def check_shapes(
    x_ND: Tensor,
    source_R: Tensor,
    weight_R: Tensor,
    rows_per_expert: list[int],
    gate_up_eFD: Tensor,
    down_eDF: Tensor,
) -> None:
    """Raises ShapeError or KernelError; reads shapes and dtypes only, never values on the device."""
    num_experts, hidden, width = down_eDF.shape
    if gate_up_eFD.shape != (num_experts, 2 * width, hidden):
        raise ShapeError(
            f"gate_up_eFD is {list(gate_up_eFD.shape)} beside down_eDF {list(down_eDF.shape)}; it has to be "
            f"[e, 2F, D] = {[num_experts, 2 * width, hidden]}."
        )
    if x_ND.dim() != 2 or x_ND.shape[1] != hidden:
        raise ShapeError(f"x_ND is {list(x_ND.shape)}; the experts take [N, D] with D = {hidden}.")
    if len(rows_per_expert) != num_experts:
        raise ShapeError(f"rows_per_expert names {len(rows_per_expert)} experts; the weights hold {num_experts}.")
    rows = sum(rows_per_expert)
    if source_R.shape != (rows,) or weight_R.shape != (rows,):
        raise ShapeError(
            f"source_R is {list(source_R.shape)} and weight_R {list(weight_R.shape)}; rows_per_expert sums to {rows}, "
            f"so both have to be [{rows}]."
        )
    if source_R.dtype != torch.int64:
        raise KernelError(f"source_R is {source_R.dtype}; rows are named by torch.int64.")
    if not x_ND.dtype == gate_up_eFD.dtype == down_eDF.dtype:
        raise KernelError(
            f"x_ND is {x_ND.dtype}, gate_up_eFD {gate_up_eFD.dtype}, down_eDF {down_eDF.dtype}; the matmuls take one "
            "dtype. Fix: convert x or the weights."
        )
