"""Bytes that one layer, and the output head, keep for the backward pass and need while it runs. One rank, one call.

Not how many micro-batches are in flight (`in_flight.py`). The one idea: a backward pass is fullest at one of few
moments, and each is a sum of named tensors; which tensors autograd really keeps was read off the running code, and the
rehearsal holds the sums to it. Two families of trainers: torch calls one by one, as megagrok's engine makes them, and
fused kernels, as Megatron with Transformer Engine has them.
"""

# t tokens of a micro-batch on a tensor group, own those that a rank keeps between split parts, T those that it routes,
# R rows of its experts, h hidden, f expert width, k top-k, e bytes of an element, A attention scores of one rank

import math
from dataclasses import dataclass
from functools import lru_cache

from megagrok.config.schema import Recompute
from megagrok.plan.shape import Habits, Shape
from megagrok.plan.work import ATTENTION_BLOCKS, SHORTEST_BLOCK, Slice


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer, one micro-batch, routing balanced."""

    kept: float
    """From the forward to the backward pass."""
    kept_of_rows: float
    """Of that, what grows with the rows that this rank's experts get."""
    transient: float
    """What the layer's backward pass adds to all that is kept, at its fullest; recomputation too."""
    transient_of_rows: float


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer's parts keep."""

    stream: float
    """Norms, residual sums, and what the first matrices of attention and MLP read."""
    attention: float
    scores: float
    """Of that, what selective recomputation drops."""
    mlp: float
    """Dense MLP and router."""
    rows: float

    @property
    def total(self) -> float:
        return self.stream + self.attention + self.scores + self.mlp + self.rows


@lru_cache(maxsize=16384)
def layer_bytes(
    shape: Shape, part: Slice, recompute: Recompute, precision_is_fp8: bool, habits: Habits, has_experts: bool
) -> LayerBytes:
    """One layer: attention, then experts or a dense MLP."""
    keep = _fused if habits.fused else _unfused
    parts = keep(shape, part, precision_is_fp8, habits, has_experts)
    extra, extra_of_rows = _backward(shape, part, parts, recompute, habits, has_experts)
    if recompute == "full":
        own_input = part.element_bytes * part.own_tokens * shape.hidden
        return LayerBytes(own_input, 0.0, parts.total + extra, parts.rows + extra_of_rows)
    kept = parts.total - (parts.scores if recompute == "selective" else 0.0)
    return LayerBytes(kept, parts.rows, max(extra, 0.0), extra_of_rows)


@lru_cache(maxsize=4096)
def head_bytes(shape: Shape, part: Slice, habits: Habits) -> tuple[float, float]:
    """The last norm, kept from forward to backward pass; and the logits at their fullest, in the backward pass."""
    stream = part.own_tokens * shape.hidden
    logits = part.tokens * shape.vocab / part.tensor
    if habits.fused:
        # bf16 logits, and their fp32 softmax, which becomes the gradient in place.
        return 2 * part.element_bytes * stream, (part.element_bytes + 4) * logits
    # fp32: capped logits, softmax, and the gradient behind the cap.
    return ((12 if part.element_bytes == 4 else 10) - 4 * habits.fuses_norms) * stream, 12 * logits


def score_elements(shape: Shape, part: Slice) -> tuple[float, float]:
    """Attention scores of one rank and layer in one micro-batch: all of them, and of the largest run of queries."""
    queries = part.seq_len // part.context
    per_pair = part.micro_batch * shape.heads / part.tensor
    if part.context > 1:
        return per_pair * queries * part.seq_len, per_pair * queries * part.seq_len
    run = max(SHORTEST_BLOCK, math.ceil(queries / ATTENTION_BLOCKS))
    ends = [min(start + run, queries) for start in range(0, queries, run)]
    starts = [0, *ends[:-1]]
    pairs = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return per_pair * pairs, per_pair * min(run, queries) * queries


def _unfused(shape: Shape, part: Slice, fp8: bool, habits: Habits, has_experts: bool) -> _Parts:
    """Each torch call keeps what its own derivative needs."""
    e, t, own, h = part.element_bytes, part.tokens, part.own_tokens, shape.hidden
    routed = t / part.tensor
    # Each of four norms keeps its fp32 input and, unfused, what it scales by the gain. In fp32 the inputs are the
    # residual sums and the results of attention and experts themselves, and the outputs what matrices read.
    stream = own * h * ((40 if e == 4 else 34) - 16 * habits.fuses_norms) + 16 * own
    mlp, rows = 0.0, 0.0
    if has_experts:
        mlp += (4 * routed * h if e == 2 else 0) + routed * (12 * shape.experts + 32 * shape.top_k)
        rows = e * routed * shape.top_k * (2 * h + 4 * shape.expert_ffn) + 8 * routed * shape.top_k * (part.expert > 1)
    elif e == 2:
        mlp += e * own * h
    dense_width = shape.shared_ffn if has_experts else shape.dense_ffn
    if dense_width:
        mlp += e * t * 5 * dense_width / part.tensor + (e * own * h if has_experts and e == 2 else 0)
    return _Parts(stream, *_kept_attention(shape, part, habits), mlp, rows)


def _fused(shape: Shape, part: Slice, fp8: bool, habits: Habits, has_experts: bool) -> _Parts:
    """Norms keep input and output, activation functions their input; FP8 matrices keep what they read in one byte."""
    e, t, own, h = part.element_bytes, part.tokens, part.own_tokens, shape.hidden
    read = 1 if fp8 else e
    stream = own * h * 2 * (e + read)
    routed = t / part.tensor
    mlp, rows = 0.0, 0.0
    gated = shape.ffn_matrices - 1
    if has_experts:
        mlp += routed * (12 * shape.experts + 32 * shape.top_k)
        each = part.expert_tensor * read * h + (gated * e + read) * shape.expert_ffn
        rows = routed * shape.top_k * (1 - habits.dropped) * each
    dense_width = shape.shared_ffn if has_experts else shape.dense_ffn
    if dense_width:
        mlp += t * (gated * e + read) * dense_width / part.tensor
    return _Parts(stream, *_kept_attention(shape, part, habits), mlp, rows)


def _kept_attention(shape: Shape, part: Slice, habits: Habits) -> tuple[float, float]:
    """Queries, keys, values and result; and the scores."""
    e, t, c = part.element_bytes, part.tokens, shape.head_dim / part.tensor
    heads, kv_heads = shape.heads, shape.kv_heads
    if habits.attention == "flash":
        return e * t * c * (2 * heads + 2 * kv_heads * part.context), 0.0
    angles = 4 * e * part.seq_len / part.context * shape.head_dim
    # Rotated queries and keys are tensors of their own; values are a view, which keeps all that the matrix returned.
    kept = 2 * heads + (3 * kv_heads + heads if part.context == 1 else 2 * kv_heads * part.context)
    scores, _ = score_elements(shape, part)
    # Capped scores and weights in fp32, and the weights once more as the values' matmul reads them.
    return e * t * c * kept + angles, scores * (8 if e == 4 else 10)


def _backward(
    shape: Shape, part: Slice, parts: _Parts, recompute: Recompute, habits: Habits, has_experts: bool
) -> tuple[float, float]:
    """What the backward pass of a layer adds to what is kept, at its fullest, and how much of it grows with rows."""
    e, own, h = part.element_bytes, part.own_tokens, shape.hidden
    if habits.fused:
        # Gradients of the stream and of the widest product of the MLP.
        width = shape.expert_ffn * shape.top_k / part.tensor if has_experts else shape.dense_ffn / part.tensor
        rows = 2 * e * part.tokens * width * (has_experts and 1)
        return 2 * e * own * h + 2 * e * part.tokens * width, rows
    # A norm's backward pass: fp32 gradients in and out, and unfused four more such tensors.
    norm = (e + 8 if habits.fuses_norms else 20 if e == 4 else 18) * own * h
    moments = [(norm, 0.0)]
    of_norm = (4 if habits.fuses_norms else 8) * own * h
    freed = of_norm + parts.mlp + parts.rows
    if has_experts:
        routed = part.tokens / part.tensor * shape.top_k * h
        combine = 8 * routed + ((8 if e == 4 else 6) * own * h - (4 * own * h if e == 4 else of_norm))
        moments.append((combine, 0.0))
        # A matrix of all local experts: the gradient as it comes, stacked, and summed in fp32.
        stacked = max(1, shape.experts // part.expert) * 2 * shape.expert_ffn * h
        moments.append(((8 if e == 4 else 6) * stacked + e * own * h - of_norm - parts.rows + e * routed, 0.0))
    if habits.attention == "scores":
        _, largest = score_elements(shape, part)
        again = parts.scores if recompute == "selective" else 0.0
        freed += 2 * of_norm
        # Gradients of a run's weights and scores, fp32; its bf16 weights are gone by then.
        moments.append((again + (8 if e == 4 else 6) * largest + e * own * h - freed, -parts.rows))
    return max(moments)
