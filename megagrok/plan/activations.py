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
from megagrok.plan.work import (
    ATTENTION_BLOCK_BYTES,
    ATTENTION_BLOCKS,
    CPU_ATTENTION_BLOCK_BYTES,
    CPU_EXPERT_ROWS,
    SHORTEST_BLOCK,
    Slice,
    head_chunk_tokens,
)


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
    """The last norm, kept from forward to backward pass; and what stands at the fullest moment of the loss."""
    e, stream = part.element_bytes, part.own_tokens * shape.hidden
    logits = part.tokens * shape.vocab / part.tensor
    if habits.fused:
        # bf16 logits, and their fp32 softmax, which becomes the gradient in place.
        return 2 * e * stream, (e + 4) * logits
    chunk = logits * head_chunk_tokens(shape, part, habits.on_cpu) / part.tokens
    weight, hidden = shape.vocab / part.tensor * shape.hidden, part.tokens * shape.hidden
    # Of a chunk: what was sigmoid, and exponential, fp32. Of all: the weight's gradient in fp32, that of hidden states.
    widened = 4 * (weight + hidden) if habits.on_cpu and e == 2 else 0.0
    narrowed = e * chunk if e == 2 and not habits.on_cpu else 0.0
    # In bf16 the weight's gradient is rounded at the end.
    fullest = max(8 * chunk + narrowed, 4 * chunk + e * weight * (e == 2))
    return 2 * e * stream, fullest + widened + 4 * weight + e * hidden * (1 + part.sequence)


def largest_block(shape: Shape, part: Slice, on_cpu: bool) -> float:
    """Attention scores that exist at once: of one run of queries, as many kv heads as fit."""
    most_bytes = CPU_ATTENTION_BLOCK_BYTES if on_cpu else ATTENTION_BLOCK_BYTES
    queries = part.seq_len // part.context
    run = min(queries, max(SHORTEST_BLOCK, math.ceil(queries / ATTENTION_BLOCKS)))
    of_head = run * part.seq_len * shape.heads / shape.kv_heads
    heads = part.micro_batch * shape.kv_heads / part.tensor
    return of_head * min(heads, max(1, most_bytes // (4 * of_head)))


def _unfused(shape: Shape, part: Slice, fp8: bool, habits: Habits, has_experts: bool) -> _Parts:
    """What each of the kernels in torch keeps (kernels/*/README.md), and Megatron's linears."""
    e, t, own, h = part.element_bytes, part.tokens, part.own_tokens, shape.hidden
    routed = t / part.tensor
    # Each of four norms keeps its input and a number a token; the results of two are what matrices read.
    stream = own * (6 * e * h + 16)
    mlp, rows = 0.0, 0.0
    if has_experts:
        # Router: capped logits and probabilities; weights and places of a token's rows.
        mlp += routed * (8 * shape.experts + 40 * shape.top_k)
        arrived = (e * h + 12) * (part.expert > 1)
        rows = routed * shape.top_k * (2 * e * shape.expert_ffn + arrived)
    dense_width = shape.shared_ffn if has_experts else shape.dense_ffn
    if dense_width:
        mlp += e * t * 5 * dense_width / part.tensor
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
    # Log-sum-exp of each query, which selective recomputation drops.
    return e * t * c * kept + angles, 4 * t * heads / part.tensor


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
    # A norm's backward pass: gradients in and out, and what passes by on the residual.
    norm = 3 * e * own * h
    moments = [(norm, 0.0)]
    freed = e * own * h
    if has_experts:
        local = max(1, shape.experts / part.expert)
        N = part.tokens / part.tensor * (shape.top_k if part.expert > 1 else 1)
        rows = part.tokens / part.tensor * shape.top_k
        weights = 3 * local * shape.expert_ffn * h
        at_once = min(rows, CPU_EXPERT_ROWS) if habits.on_cpu else rows / local
        scratch = e * at_once * (3 * h + 5 * shape.expert_ffn)
        # Gradient of the result, its fp32 sum for the input, scratch of a run, gradients of the weights.
        moments.append(((e + 4) * N * h + scratch + e * weights + e * own * h - freed, (e + 4) * N * h))
        # Then, in bf16, added to their fp32 sums, the wider of the two first.
        moments.append(((e + 8 / 3 * (e == 2)) * weights + e * N * h - freed - parts.rows, -parts.rows))
    # Keys and values by head; their gradients in fp32, and that of queries; a block of scores, widened three times.
    c, heads, kv_heads = shape.head_dim / part.tensor, shape.heads, shape.kv_heads
    keys = part.tokens * c * kv_heads * part.context
    queries = part.tokens * c * heads
    block = largest_block(shape, part, habits.on_cpu) * (12 if e == 4 else 18) if habits.attention == "scores" else 0.0
    moments.append(
        ((2 * e + 8) * keys + 2 * e * queries + block + e * own * h - freed - parts.mlp - parts.rows, -parts.rows)
    )
    return max(moments)
