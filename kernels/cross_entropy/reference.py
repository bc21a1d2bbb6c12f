"""Cross-entropy with multiplier and soft-cap in plain torch, the logits whole: the specification. Any float dtype."""

# T tokens, D hidden, V vocabulary

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL: Final = -100
"""A token with this label is not counted."""


def cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, multiplier: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """The sum of the tokens' losses, and each; on one rank that has the whole vocabulary."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = F.linear(hidden_TD.to(wide), weight_VD.to(wide)) * multiplier
    if cap is not None:
        logits_TV = cap * torch.tanh(logits_TV / cap)
    losses_T = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="none")
    return losses_T.sum(), losses_T.detach()
