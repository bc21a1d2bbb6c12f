"""The router's matmul, in fp32 whatever x is, without keeping x's fp32 copy for the backward pass."""
# T tokens, D hidden, E experts

import torch
import torch.nn.functional as F
from torch import Tensor


def make_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T, [T, E], in fp32, or in x's dtype if that is wider."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(wide), weight_ED.to(wide))


def gradients(
    dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of weight, each in its own dtype, or None where not needed."""
    dx_TD = dweight_ED = None
    if needed[0]:
        dx_TD = (dlogits_TE @ weight_ED.to(dlogits_TE.dtype)).to(x_TD.dtype)
    if needed[1]:
        dweight_ED = (dlogits_TE.t() @ x_TD.to(dlogits_TE.dtype)).to(weight_ED.dtype)
    return dx_TD, dweight_ED
