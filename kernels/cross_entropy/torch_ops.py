"""Cross-entropy by chunks of tokens, in torch: three matmuls a chunk, and between them as few passes as can be.

The gradient of a sum of losses is known as soon as the losses are, up to one factor, so it is made in the forward pass
while a chunk's logits are at hand (Liger Kernel, Hsu et al. 2024); the backward pass multiplies by the factor.

A chunk's softmax is never divided by its sum: G = exp(logit) * (slope of the cap) is made in place, and the rows are
divided where they are narrow, as rows of D. What is between the matmuls is a `Middle`, which kernel.py has in Triton.
"""

# T tokens, C tokens of a chunk, D hidden, v rows of the vocabulary on this rank

import math
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagrok.errors import KernelError, ShapeError
from megagrok.kernels.cross_entropy.reference import IGNORED_LABEL

LOG2_E: Final = math.log2(math.e)

LARGEST_CAP_WITHOUT_MAXIMUM: Final = 70.0
"""exp(70) = 2.5e30 and exp(-70) = 4e-31 are normal numbers of fp32 and of bf16, and so are sums of 1e8 of the former:
within this cap no maximum has to be found, nor agreed on by the ranks."""

CHUNK_BYTES: Final = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of a chunk's logits: a cache's worth; on a GPU enough that a matmul fills it."""

FEWEST_TOKENS: Final = {"cpu": 512, "cuda": 2048}
"""Of a chunk. The weight's fp32 gradient is read and written once a chunk, 8 v D bytes for 2 C v D FLOPs: below C / 4
FLOPs per byte the memory would be slower than the matmul (a GPU of 990 TFLOP/s and 3.35 TB/s balances at 295)."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states to logits, besides the weight."""

    multiplier: float
    cap: float | None
    group: dist.ProcessGroup | None
    first_token: int

    @property
    def is_bounded(self) -> bool:
        """No logit's exponential leaves fp32."""
        return self.cap is not None and self.cap <= LARGEST_CAP_WITHOUT_MAXIMUM


@dataclass(frozen=True, slots=True)
class Labels:
    """Of one chunk: its labels as columns of this rank's logits."""

    is_counted_C: Tensor
    is_here_C: Tensor
    column_C: Tensor
    """Any column where the label is not here."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one chunk, over the whole vocabulary. Both may be relative to a shift of the token's logits."""

    power_C: Tensor
    """Sum of 2^(logit * log2 e)."""
    label_C: Tensor
    """The label's logit * log2 e."""
    is_known_C: Tensor
    """Some rank has the label."""

    def losses(self, labels: Labels) -> Tensor:
        """Of each token, fp32."""
        losses_C = (self.power_C.log2() - self.label_C) * math.log(2)
        return losses_C.where(self.is_known_C, math.nan).where(labels.is_counted_C, 0.0)


@dataclass(frozen=True, slots=True)
class Done:
    """What a `Middle` makes of a chunk."""

    losses_C: Tensor
    gradient_Cv: Tensor | None
    """Of hidden weight^T, rows still to be multiplied by scale_C, if that is given. In the dtype of the matmuls."""
    scale_C: Tensor | None


class Middle(Protocol):
    """All that happens to a chunk between the matmul to its logits and those of its gradients."""

    def __call__(self, raw_Cv: Tensor, labels: Labels, head: Head, dtype: torch.dtype | None) -> Done:
        """raw_Cv: fp32, given away, `raw_factor(head)` * hidden weight^T. dtype: of the gradient; None: not wanted."""


def raw_factor(head: Head) -> float:
    """What the matmul multiplies its result by, which costs nothing there.

    With a cap, -2 multiplier / cap: tanh(x) is a function of the exponential of -2x. Without, multiplier * log2(e).
    """
    return head.multiplier * LOG2_E if head.cap is None else -2 * head.multiplier / head.cap


def cross_entropy(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    *,
    multiplier: float,
    cap: float | None,
    group: dist.ProcessGroup | None,
    first_token: int,
) -> tuple[Tensor, Tensor]:
    """See `CrossEntropy`."""
    return cross_entropy_by(middle, hidden_TD, weight_vD, labels_T, Head(multiplier, cap, group, first_token))


def cross_entropy_by(
    middle: Middle, hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """The operation, with that `Middle`."""
    _check(hidden_TD, weight_vD, labels_T, head)
    is_recorded = torch.is_grad_enabled()
    wants_hidden, wants_weight = is_recorded and hidden_TD.requires_grad, is_recorded and weight_vD.requires_grad
    loss_sum, losses_T = _CrossEntropy.apply(hidden_TD, weight_vD, labels_T, head, middle, wants_hidden, wants_weight)  # type: ignore[no-untyped-call]
    return loss_sum, losses_T


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        labels_T: Tensor,
        head: Head,
        middle: Middle,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        losses_T, *gradients = _by_chunks(hidden_TD, weight_vD, labels_T, head, middle, wants_hidden, wants_weight)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum(), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        # In place: a second pass through the same graph is refused by autograd, which counts changes of what it keeps.
        hidden_grad, weight_grad = (kept if kept is None else kept.mul_(grads[0]) for kept in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None, None, None


def _by_chunks(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    head: Head,
    middle: Middle,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens' losses, and the gradients of their sum that are wanted."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    # A CPU multiplies narrow numbers more slowly than it widens them, and rounds the result.
    dtype = hidden_TD.dtype if hidden_TD.device.type == "cuda" else wide
    rows_TD, weight_vD_ = hidden_TD.to(dtype), weight_vD.to(dtype)
    num_tokens, width = len(hidden_TD), len(weight_vD)
    size = chunk_tokens(num_tokens, width, hidden_TD.device)
    raw_Cv = hidden_TD.new_empty(size, width, dtype=wide)
    losses_T = hidden_TD.new_empty(num_tokens, dtype=wide)
    hidden_grad = torch.empty_like(hidden_TD) if wants_hidden else None
    weight_grad = torch.zeros_like(weight_vD, dtype=wide) if wants_weight else None
    gradient_dtype = dtype if wants_hidden or wants_weight else None
    for start in range(0, num_tokens, size):
        chunk = slice(start, min(start + size, num_tokens))
        rows_CD = rows_TD[chunk]
        logits_Cv = raw_Cv[: len(rows_CD)]
        _add_product(logits_Cv, rows_CD, weight_vD_.t(), beta=0, alpha=raw_factor(head))
        done = middle(logits_Cv, make_labels(labels_T[chunk], head, width), head, gradient_dtype)
        losses_T[chunk] = done.losses_C
        if done.gradient_Cv is None:
            continue
        if hidden_grad is not None:
            grad_CD = done.gradient_Cv @ weight_vD_
            hidden_grad[chunk] = grad_CD if done.scale_C is None else grad_CD.mul_(done.scale_C[:, None])
        if weight_grad is not None:
            scaled_CD = rows_CD if done.scale_C is None else rows_CD * done.scale_C[:, None]
            _add_product(weight_grad, done.gradient_Cv.t(), scaled_CD)
    return losses_T, hidden_grad, None if weight_grad is None else weight_grad.to(weight_vD.dtype)


def chunk_tokens(num_tokens: int, width: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as CHUNK_BYTES of logits, at least FEWEST_TOKENS, and all chunks about alike."""
    kind = device.type if device.type in CHUNK_BYTES else "cpu"
    most = max(CHUNK_BYTES[kind] // (4 * width), FEWEST_TOKENS[kind])
    return max(1, -(-num_tokens // max(1, -(-num_tokens // most))))


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    """out = beta out + alpha left right, added in out's dtype. Not addmm_, which torch's FLOP counter does not see."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def make_labels(labels_C: Tensor, head: Head, width: int) -> Labels:
    """Of one chunk, on a rank with `width` rows of the vocabulary."""
    column_C = labels_C - head.first_token
    is_counted_C = labels_C != IGNORED_LABEL
    is_here_C = is_counted_C & (column_C >= 0) & (column_C < width)
    return Labels(is_counted_C, is_here_C, column_C.clamp(0, width - 1))


def middle(raw_Cv: Tensor, labels: Labels, head: Head, dtype: torch.dtype | None) -> Done:
    """See `Middle`. Ten passes with a cap, four without."""
    column_C1 = labels.column_C[:, None]
    if head.cap is None:
        power_Cv = gradient_Cv = raw_Cv
        slope_C = raw_Cv.new_ones(len(raw_Cv))
        factor = head.multiplier
    else:
        scale = head.cap * LOG2_E
        # tanh(-x) = e / (e + 2), e = expm1(-2x): near 0 as exact as tanh, which 1 - 2 sigmoid is not.
        turned_Cv = raw_Cv.clamp_(max=40.0).expm1_()
        power_Cv = turned_Cv + 2.0
        turned_Cv.div_(power_Cv)
        torch.mul(turned_Cv, -scale, out=power_Cv)
        slope_C = 1 - turned_Cv.gather(1, column_C1).squeeze(1).square()
        factor = head.multiplier
    if not head.is_bounded:
        power_Cv.sub_(all_reduce_maximum(power_Cv.amax(dim=1), head.group)[:, None])
    label_C = power_Cv.gather(1, column_C1).squeeze(1)
    power_Cv.exp2_()
    sums = reduce_sums(power_Cv.sum(dim=1), label_C, labels, head)
    losses_C = sums.losses(labels)
    if dtype is None:
        return Done(losses_C, None, None)
    if head.cap is not None:
        one = turned_Cv.new_ones(())
        gradient_Cv = torch.addcmul(one, turned_Cv, turned_Cv, value=-1, out=turned_Cv).mul_(power_Cv)
    # Softmax minus one at the label. Gathered and put back: no two tokens share an element, so nothing has to be added.
    at_label_C = gradient_Cv.gather(1, column_C1).squeeze(1)
    at_label_C = at_label_C - (sums.power_C * slope_C).where(labels.is_here_C, 0.0)
    gradient_Cv.scatter_(1, column_C1, at_label_C[:, None])
    scale_C = (factor / sums.power_C).where(labels.is_counted_C, 0.0)
    if dtype == gradient_Cv.dtype:
        return Done(losses_C, gradient_Cv, scale_C)
    narrow_Cv = torch.empty_like(gradient_Cv, dtype=dtype)
    return Done(losses_C, torch.mul(gradient_Cv, scale_C[:, None], out=narrow_Cv), None)


def reduce_sums(power_C: Tensor, label_C: Tensor, labels: Labels, head: Head) -> Sums:
    """This rank's sums and its labels' logits, over the group: one all-reduce of [3, C]."""
    is_here_C = labels.is_here_C
    sums_3C = torch.stack([power_C, label_C.where(is_here_C, 0.0), is_here_C.to(power_C.dtype)])
    if head.group is not None:
        dist.all_reduce(sums_3C, group=head.group)
    return Sums(sums_3C[0], sums_3C[1], sums_3C[2] > 0)


def all_reduce_maximum(maximum_C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In place; only logits without bound need it."""
    if group is not None:
        dist.all_reduce(maximum_C, op=dist.ReduceOp.MAX, group=group)
    return maximum_C


def _check(hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, head: Head) -> None:
    """Reads shapes and dtypes only."""
    if hidden_TD.dim() != 2 or weight_vD.dim() != 2 or hidden_TD.shape[1] != weight_vD.shape[1] or not len(weight_vD):
        raise ShapeError(
            f"hidden_TD is {list(hidden_TD.shape)} and weight_vD {list(weight_vD.shape)}; they have to be [T, D] and "
            "[v, D], v at least 1."
        )
    if labels_T.shape != hidden_TD.shape[:1]:
        raise ShapeError(f"labels_T is {list(labels_T.shape)}; {len(hidden_TD)} tokens have [{len(hidden_TD)}].")
    if labels_T.dtype != torch.int64:
        raise KernelError(f"labels_T is {labels_T.dtype}; labels are torch.int64.")
    if hidden_TD.dtype != weight_vD.dtype or not hidden_TD.is_floating_point():
        raise KernelError(
            f"hidden_TD is {hidden_TD.dtype} and weight_vD {weight_vD.dtype}; both have to be of one float dtype."
        )
    if head.cap is not None and head.cap <= 0:
        raise KernelError(f"cap is {head.cap}; a soft-cap is above 0, or None.")
