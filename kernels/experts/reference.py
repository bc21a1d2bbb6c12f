"""The experts in plain torch, one after the other: what every other implementation has to equal.

Slow and obvious. Differentiable by autograd, in any dtype; the tests run it in fp64.
"""

# N rows of x, R rows (one per choice of a token), e experts of this rank, D hidden, F expert width

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_experts(
    x_ND: Tensor,
    source_R: Tensor,
    weight_R: Tensor,
    rows_per_expert: list[int],
    gate_up_eFD: Tensor,
    down_eDF: Tensor,
) -> Tensor:
    """out[source_R[r]] += weight_R[r] * down_e( gelu_tanh(gate_e x) * up_e x ), x = x_ND[source_R[r]]."""
    out_ND = torch.zeros_like(x_ND)
    experts = zip(
        torch.split(source_R, rows_per_expert),
        torch.split(weight_R, rows_per_expert),
        gate_up_eFD,
        down_eDF,
        strict=True,
    )
    for source, weight, gate_up_FD, down_DF in experts:
        gate, up = F.linear(x_ND[source], gate_up_FD).chunk(2, dim=-1)
        y = F.linear(F.gelu(gate, approximate="tanh") * up, down_DF)
        out_ND = out_ND.index_add(0, source, (y * weight[:, None]).to(out_ND.dtype))
    return out_ND
