"""The experts of a rank: gather the rows of each, gated tanh-GELU MLP, weighted sum back to the tokens. One operation.

One signature for both of its uses. On one rank x holds the tokens and `source_R` names the token of each row; with
expert parallelism x holds the rows that arrived and `source_R` is the permutation that sorts them by expert.
"""

# N rows of x, R rows (one per choice of a token), e experts of this rank, D hidden, F expert width

from typing import Protocol

import torch
from torch import Tensor

from megagrok.kernels.choice import choose


class Experts(Protocol):
    """What every implementation is."""

    def __call__(
        self,
        x_ND: Tensor,
        source_R: Tensor,
        weight_R: Tensor,
        rows_per_expert: list[int],
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        """out[source_R[r]] += weight_R[r] * down_e( gelu_tanh(gate_e x) * up_e x ), x = x_ND[source_R[r]].

        source_R: int64, sorted by expert; no row of x twice within an expert, and every row of x R / N times in all.
        weight_R: fp32. rows_per_expert: on the host, sums to R, may hold zeros.
        gate_up_eFD: [e, 2F, D], the gate's rows first; down_eDF: [e, D, F]; both of x's dtype.
        Returns [N, D] in x's dtype; the sum over a token's rows is fp32. Differentiable in x, weight and both weights;
        keeps x, the pre-activations [R, 2F] and the routing. No collective, no wait on the device.
        Raises ShapeError, KernelError.
        """


def choose_experts(wanted: str, device: torch.device) -> Experts:
    """The implementation of that name, or the fastest there for `auto`. Raises KernelError if it cannot run there."""
    name = choose("experts", wanted, device)
    if name == "triton":
        from megagrok.kernels.experts.kernel import mix_experts as triton_experts

        return triton_experts
    if name == "grouped_mm":
        from megagrok.kernels.experts.grouped import mix_experts as grouped_experts

        return grouped_experts
    from megagrok.kernels.experts.torch_ops import mix_experts as torch_experts

    return torch_experts
