"""The router as it is defined: plain torch, one line after the other, differentiated by autograd."""
# T tokens, D hidden, E experts, K top-k

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrok.kernels.router.door import Routed, Scores


def route(
    x_TD: Tensor, weight_ED: Tensor, *, cap: float | None, top_k: int, scores: Scores, renormalize: bool
) -> Routed:
    """See `Router`; fp32, or x's dtype if that is wider."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = F.linear(x_TD.to(wide), weight_ED.to(wide))
    if cap is not None:
        logits_TE = torch.tanh(logits_TE / cap) * cap
    if scores == "softmax":
        scores_TE = probabilities_TE = logits_TE.softmax(dim=-1)
    else:
        scores_TE = logits_TE.sigmoid()
        probabilities_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    weights_TK, experts_TK = scores_TE.topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routed(
        weights_TK,
        experts_TK,
        experts_TK.flatten().bincount(minlength=len(weight_ED)),
        probabilities_TE.sum(dim=0),
        logits_TE.logsumexp(dim=-1).square().sum(),
    )
