"""The gated tanh-GELU of a run and its derivative, in passes over memory that the caller lends.

    gelu_tanh(g) = g s(z),   z = 2k (g + c g^3),   s the logistic function,   since (1 + tanh y) / 2 = s(2y)
    gelu_tanh'(g) = s + g s (1 - s) z',            z' = 2k (1 + 3c g^2)

On a CPU torch's tanh takes four times as long as its logistic function, so there fp32 and fp64 go by these formulas.
In narrower dtypes each pass would round, and on a GPU each pass is a trip to memory: there torch's own GELU is used.
"""

# r rows of a run, F expert width

import torch
from torch import Tensor

TWO_K = 2 * (2 / torch.pi) ** 0.5
C = 0.044715


def gated_gelu(H_rF: Tensor, weight_r1: Tensor, a_rF: Tensor) -> None:
    """a = weight gelu_tanh(g) u of H = [g, u]."""
    gate, up = H_rF.chunk(2, dim=1)
    if _is_wide_on_cpu(H_rF):
        _logistic(gate, a_rF)
        a_rF.mul_(gate)
    else:
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=a_rF)
    a_rF.mul_(up).mul_(weight_r1)


def gated_gelu_gradients(
    H_rF: Tensor, weight_r1: Tensor, da_rF: Tensor, a_rF: Tensor, dH_rF: Tensor, scratch_rF: Tensor
) -> Tensor:
    """From da, the gradient of what weight multiplies not yet: fills a as above and dH; returns dweight_r. Eats da."""
    gate, up = H_rF.chunk(2, dim=1)
    dgate, dup = dH_rF.chunk(2, dim=1)
    is_wide_on_cpu = _is_wide_on_cpu(H_rF)
    if is_wide_on_cpu:
        _logistic(gate, a_rF)
        torch.mul(gate, a_rF, out=dup)
        torch.addcmul(_scalar(TWO_K, gate), gate, gate, value=3 * C * TWO_K, out=dgate)
        # gelu' = s + (gelu z') (1 - s)
        dgate.mul_(dup)
        torch.lerp(dgate, _scalar(1.0, gate), a_rF, out=dgate)
        torch.mul(dup, up, out=a_rF)
    else:
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=dup)
        torch.mul(dup, up, out=a_rF)
    dweight_r = torch.mul(da_rF, a_rF, out=scratch_rF).sum(1, dtype=weight_r1.dtype)
    a_rF.mul_(weight_r1)
    da_rF.mul_(weight_r1)
    dup.mul_(da_rF)
    da_rF.mul_(up)
    if is_wide_on_cpu:
        dgate.mul_(da_rF)
    else:
        torch.ops.aten.gelu_backward.grad_input(da_rF, gate, approximate="tanh", grad_input=dgate)
    return dweight_r


def _logistic(gate_rF: Tensor, s_rF: Tensor) -> None:
    torch.addcmul(_scalar(TWO_K, gate_rF), gate_rF, gate_rF, value=C * TWO_K, out=s_rF)
    s_rF.mul_(gate_rF).sigmoid_()


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype)


def _is_wide_on_cpu(H_rF: Tensor) -> bool:
    return H_rF.device.type == "cpu" and H_rF.dtype in (torch.float32, torch.float64)
