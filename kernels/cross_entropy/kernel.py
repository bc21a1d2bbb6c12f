"""Cross-entropy by chunks of tokens, with all that lies between a chunk's matmuls in two Triton kernels.

The matmuls stay torch's, and chunks, labels and the exchange with other ranks those of torch_ops.py. A logit is read
twice and its gradient written once: `_sum_row` has one program a token, which walks the row; after the ranks have
exchanged the sums, `_write_gradient` is elementwise, in place where the dtype is the same. No atomics.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# C tokens of a chunk, v rows of the vocabulary on this rank

from typing import Final

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.cross_entropy.torch_ops import (
    LOG2_E,
    Done,
    Head,
    Labels,
    all_reduce_maximum,
    cross_entropy_by,
    reduce_sums,
)

SUM_BLOCK: Final = 4096
GRADIENT_BLOCK: Final = 2048
NUM_WARPS: Final = 8
"""16 and 8 columns a thread: four and two loads of 16 bytes in flight."""


@triton.jit
def _logit_and_slope(raw, scale, IS_CAPPED: tl.constexpr):
    """The logit * log2 e, and a quarter of the cap's slope (1 without cap), of an element as `raw_factor` leaves it."""
    if IS_CAPPED:
        turned = tl.sigmoid(raw)
        logit = scale - 2 * scale * turned
        slope = turned - turned * turned
    else:
        logit = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    return logit, slope


@triton.jit
def _sum_row(
    raw_ptr,
    column_ptr,
    power_ptr,
    label_ptr,
    shift_ptr,
    width_v,
    stride_v,
    scale,
    IS_CAPPED: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one token: sum of 2^(logit - shift), the label's logit, and the shift: the largest logit, 0 if bounded."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + token * stride_v
    shift = tl.full((), 0.0, tl.float32)
    if not IS_BOUNDED:
        shift -= float("inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width_v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_in_v = columns < width_v
        logit, _ = _logit_and_slope(tl.load(row_ptr + columns, mask=is_in_v, other=0.0), scale, IS_CAPPED)
        logit = tl.where(is_in_v, logit, -float("inf"))
        if IS_BOUNDED:
            total += tl.exp2(logit)
        else:
            larger = tl.maximum(shift, tl.max(logit, axis=0))
            total = total * tl.exp2(shift - larger) + tl.exp2(logit - larger)
            shift = larger
    # Computed as a block of one, so that the same code rounds it as rounds the sum's terms.
    one = tl.arange(0, 1)
    at_label = tl.load(row_ptr + tl.load(column_ptr + token) + one)
    label, _ = _logit_and_slope(at_label, scale, IS_CAPPED)
    tl.store(label_ptr + token + one, label)
    tl.store(power_ptr + token, tl.sum(total, axis=0))
    tl.store(shift_ptr + token, shift)


@triton.jit
def _write_gradient(
    raw_ptr,
    out_ptr,
    column_ptr,
    at_label_ptr,
    scale_ptr,
    shift_ptr,
    width_v,
    stride_v,
    scale,
    IS_CAPPED: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of one token's columns: row_scale * slope * (2^(logit - shift), less at_label at the label)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in_v = columns < width_v
    raw = tl.load(raw_ptr + token * stride_v + columns, mask=is_in_v, other=0.0)
    logit, slope = _logit_and_slope(raw, scale, IS_CAPPED)
    if not IS_BOUNDED:
        logit -= tl.load(shift_ptr + token)
    at_label = tl.where(columns == tl.load(column_ptr + token), tl.load(at_label_ptr + token), 0.0)
    gradient = tl.load(scale_ptr + token) * slope * (tl.exp2(logit) - at_label)
    tl.store(out_ptr + token * stride_v + columns, gradient.to(out_ptr.dtype.element_ty), mask=is_in_v)


def middle(raw_Cv: Tensor, labels: Labels, head: Head, dtype: torch.dtype | None) -> Done:
    """See torch_ops.Middle. Raises KernelError for logits that are not fp32."""
    if raw_Cv.dtype != torch.float32 or not raw_Cv.is_contiguous():
        raise KernelError(
            f"kernels.cross_entropy = triton takes contiguous rows of torch.float32, not {raw_Cv.dtype} with strides "
            f"{list(raw_Cv.stride())}. Fix: a model of fp32, bf16 or fp16, or kernels.cross_entropy=torch."
        )
    num_tokens, width = raw_Cv.shape
    power_C, label_C, shift_C = raw_Cv.new_empty(3, num_tokens).unbind()
    scale = 0.0 if head.cap is None else head.cap * LOG2_E
    kind = {"IS_CAPPED": head.cap is not None, "IS_BOUNDED": head.is_bounded}
    block = min(SUM_BLOCK, triton.next_power_of_2(width))
    _sum_row[(num_tokens,)](
        raw_Cv, labels.column_C, power_C, label_C, shift_C, width, width, scale,
        **kind, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    if not head.is_bounded:
        power_C, shift_C = _agree(power_C, shift_C, head.group)
    sums = reduce_sums(power_C, label_C - shift_C, labels, head)
    losses_C = sums.losses(labels)
    if dtype is None:
        return Done(losses_C, None, None)
    factor = head.multiplier if head.cap is None else 4 * head.multiplier
    scale_C = (factor / sums.power_C).where(labels.is_counted_C, 0.0)
    at_label_C = sums.power_C.where(labels.is_here_C, 0.0)
    gradient_Cv = raw_Cv if dtype == raw_Cv.dtype else torch.empty_like(raw_Cv, dtype=dtype)
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(width))
    _write_gradient[(num_tokens, triton.cdiv(width, block))](
        raw_Cv, gradient_Cv, labels.column_C, at_label_C, scale_C, shift_C, width, width, scale,
        **kind, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return Done(losses_C, gradient_Cv, None)


def _agree(power_C: Tensor, shift_C: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The ranks' largest shift, and this rank's sums relative to it."""
    largest_C = all_reduce_maximum(shift_C.clone(), group)
    return power_C * (shift_C - largest_C).exp2(), largest_C


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
