"""The loss of the vocabulary: head matmul, output multiplier, soft-cap, log-sum-exp and both gradients. One operation.

The logits are the largest tensor of a language model, and here they never exist whole: a chunk of tokens at a time goes
from logits to loss to gradients, and only the gradients are kept. Ranks may share the vocabulary's rows.
"""

# T tokens, D hidden, v rows of the vocabulary on this rank

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagrok.kernels.choice import choose


class CrossEntropy(Protocol):
    """What every implementation is."""

    def __call__(
        self,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        labels_T: Tensor,
        *,
        multiplier: float,
        cap: float | None,
        group: dist.ProcessGroup | None,
        first_token: int,
    ) -> tuple[Tensor, Tensor]:
        """Sum over the tokens of logsumexp(l) - l[label], l = cap * tanh(hidden weight^T * multiplier / cap); and each.

        labels_T: int64, of the whole vocabulary; IGNORED_LABEL (reference.py) counts nothing. A label that no rank has
        makes its loss nan. cap: None leaves the logits uncapped. group: the ranks that share the vocabulary, or None;
        this rank has rows first_token .. first_token + v, v the same on each. Collective over group, with the same
        hidden and labels on each rank.
        Returns the sum, differentiable once in hidden and weight, and losses_T without gradient, both fp32 (fp64 for
        fp64). The gradient of hidden is this rank's part: its caller sums over group. Keeps the two gradients only,
        each in its tensor's dtype. No wait on the device. Raises ShapeError, KernelError.
        """


def choose_cross_entropy(wanted: str, device: torch.device) -> CrossEntropy:
    """The implementation of that name, or the fastest there for `auto`. Raises KernelError if it cannot run there."""
    if choose("cross_entropy", wanted, device) == "triton":
        from megagrok.kernels.cross_entropy.kernel import cross_entropy as triton_cross_entropy

        return triton_cross_entropy
    from megagrok.kernels.cross_entropy.torch_ops import cross_entropy as torch_cross_entropy

    return torch_cross_entropy
