"""Soft-capped causal attention in Triton, after FlashAttention-2: scores live in registers only, in either direction.

Forward, a program has a tile of queries of one head and walks over the keys that they may see, with a running maximum
and sum (online softmax). Backward, one kernel has a tile of queries and walks over keys (gradient of q), another has a
tile of keys and walks over the queries of all heads of its group (gradients of k and v): each product is summed by one
program in one order, so there are no atomics and the bits are always the same. Both make the scores once more from q, k
and each query's log-sum-exp. As in torch_ops.py, tanh is a sigmoid whose constants went into the factors beside it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# s queries, S keys, b micro-batch, h query heads, g kv heads, c head width; in kernels Q queries and K keys of a tile,
# C the tile of the head width: c rounded up to a power of two

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagrok.errors import KernelError
from megagrok.kernels.attention.shapes import LOG2_E, check_shapes, slope_of

_WIDEST_HEAD = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    v_Sbgc: Tensor,
    *,
    cap: float | None,
    tau_s: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `megagrok.kernels.attention.Attention` says. Raises KernelError also for fp64 and heads wider than 256."""
    check_shapes(q_sbhc, k_Sbgc, v_Sbgc, cap, tau_s, positions)
    if q_sbhc.dtype not in _DTYPES:
        raise KernelError(f"attention takes fp32, bf16 and fp16, got {q_sbhc.dtype}. Fix: kernels.attention=torch.")
    if q_sbhc.shape[-1] > _WIDEST_HEAD:
        raise KernelError(
            f"attention takes heads of up to {_WIDEST_HEAD}, got {q_sbhc.shape[-1]}. Fix: kernels.attention=torch."
        )
    return _attention(q_sbhc, k_Sbgc, v_Sbgc, cap, tau_s, positions)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_sbhc: Tensor,
        k_Sbgc: Tensor,
        v_Sbgc: Tensor,
        cap: float | None,
        tau_s: Tensor | None,
        positions: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        s, b, h, _ = q_sbhc.shape
        q_sbhc, k_Sbgc, v_Sbgc = q_sbhc.contiguous(), k_Sbgc.contiguous(), v_Sbgc.contiguous()
        result_sbhc = torch.empty_like(q_sbhc)
        log2_sums_bhs = q_sbhc.new_empty(b, h, s, dtype=torch.float32)
        common = _common(q_sbhc, k_Sbgc, cap, tau_s, positions)
        tile = _tile(q_sbhc, queries=128, keys=64, num_stages=3)
        if q_sbhc.numel():
            grid = (triton.cdiv(s, tile["BLOCK_Q"]), b * h)
            _forward[grid](q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_bhs, **common, **tile)
        ctx.cap = cap
        ctx.save_for_backward(q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_bhs, tau_s, *(positions or ()))
        return result_sbhc.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_bhs, tau_s, *rest = ctx.saved_tensors
        (s, b, h, c), (S, _, g, _) = q_sbhc.shape, k_Sbgc.shape
        grad_sbhc = grads[0].reshape(q_sbhc.shape).contiguous()
        grad_q_sbhc, grad_k_Sbgc, grad_v_Sbgc = (torch.empty_like(x) for x in (q_sbhc, k_Sbgc, v_Sbgc))
        inner_bhs = torch.empty_like(log2_sums_bhs)
        common = _common(q_sbhc, k_Sbgc, ctx.cap, tau_s, (rest[0], rest[1]) if rest else None)
        slope = slope_of(c, ctx.cap)
        known = q_sbhc, k_Sbgc, v_Sbgc, grad_sbhc, log2_sums_bhs, inner_bhs
        if q_sbhc.numel():
            rows = {"BLOCK_R": 64, "BLOCK_C": triton.next_power_of_2(c)}
            _inner[(triton.cdiv(s * b * h, 64),)](result_sbhc, grad_sbhc, inner_bhs, s, b * h, c, **rows)
            tile = _tile(q_sbhc, queries=128, keys=64, num_stages=2)
            grid = (triton.cdiv(s, tile["BLOCK_Q"]), b * h)
            _backward_of_queries[grid](*known, grad_q_sbhc, slope, **common, **tile)
        if k_Sbgc.numel():
            tile = _tile(q_sbhc, queries=64, keys=128, num_stages=2)
            grid = (triton.cdiv(S, tile["BLOCK_K"]), b * g)
            _backward_of_keys[grid](*known, grad_k_Sbgc, grad_v_Sbgc, slope, **common, **tile)
        return grad_q_sbhc, grad_k_Sbgc, grad_v_Sbgc, None, None, None


_attention: Callable[..., Tensor] = _Attention.apply


def _common(
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    cap: float | None,
    tau_s: Tensor | None,
    positions: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Arguments that all three kernels share. What a flag says is not there is never read."""
    (s, b, h, c), (S, _, g, _) = q_sbhc.shape, k_Sbgc.shape
    query_positions_s, key_positions_S = (None, None) if positions is None else (x.contiguous() for x in positions)
    return {
        "tau_s": None if tau_s is None else tau_s.float().contiguous(),
        "query_positions_s": query_positions_s,
        "key_positions_S": key_positions_S,
        "s": s,
        "S": S,
        "b": b,
        "h": h,
        "g": g,
        "c": c,
        # With a cap the product goes into exp2(-x) of the sigmoid, whose argument is twice that of the tanh.
        "scale": c**-0.5 if cap is None else c**-0.5 * LOG2_E * 2 / cap,
        "log2_scale": LOG2_E if cap is None else LOG2_E * 2 * cap,
        "HAS_CAP": cap is not None,
        "HAS_TAU": tau_s is not None,
        "HAS_POSITIONS": positions is not None,
    }


def _tile(q_sbhc: Tensor, *, queries: int, keys: int, num_stages: int) -> dict[str, int]:
    """Sizes that keep a tile's sums in registers: halved for wide heads, and for fp32, which no tensor core takes."""
    width = max(16, triton.next_power_of_2(q_sbhc.shape[-1]))
    halved = 2 if width > 128 or q_sbhc.dtype == torch.float32 else 1
    return {
        "BLOCK_Q": queries // halved,
        "BLOCK_K": keys // halved,
        "BLOCK_C": width,
        "num_warps": 8 if width >= 128 else 4,
        "num_stages": num_stages if halved == 1 else 1,
    }


@triton.jit
def _load(x, positions, num_positions, heads, head, c, BLOCK_C: tl.constexpr):
    """Tile [positions, C] of one head of x [num_positions, heads, c]; 0 beyond either end."""
    column_C = tl.arange(0, BLOCK_C)
    offset = (positions.to(tl.int64)[:, None] * heads + head) * c + column_C[None, :]
    return tl.load(x + offset, mask=(positions[:, None] < num_positions) & (column_C[None, :] < c), other=0.0)


@triton.jit
def _store(x, tile, positions, num_positions, heads, head, c, BLOCK_C: tl.constexpr):
    column_C = tl.arange(0, BLOCK_C)
    offset = (positions.to(tl.int64)[:, None] * heads + head) * c + column_C[None, :]
    mask = (positions[:, None] < num_positions) & (column_C[None, :] < c)
    tl.store(x + offset, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_positions(given, index, count, beyond, HAS_POSITIONS: tl.constexpr):
    """Where queries or keys stand; `beyond` past the last."""
    if HAS_POSITIONS:
        positions = tl.load(given + index, mask=index < count, other=beyond)
    else:
        positions = tl.where(index < count, index, beyond)
    return positions


@triton.jit
def _squash(products, scale, HAS_CAP: tl.constexpr):
    """sigmoid(2 q k / sqrt(c) / cap), or q k / sqrt(c) without a cap."""
    if HAS_CAP:
        squashed = 1.0 / (1.0 + tl.exp2(-scale * products))
    else:
        squashed = scale * products
    return squashed


@triton.jit
def _forward(
    q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_bhs,
    tau_s, query_positions_s, key_positions_S, s, S, b, h, g, c, scale, log2_scale,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Later queries see more keys: they start first, so that no long program is left for the end.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    batch_head = tl.program_id(1)
    kv_head = (batch_head // h) * g + (batch_head % h) // (h // g)
    query_Q = first_query + tl.arange(0, BLOCK_Q)
    q_QC = _load(q_sbhc, query_Q, s, b * h, batch_head, c, BLOCK_C)
    # Queries beyond the last see everything: their sums stay finite, and nothing of them is stored.
    position_Q = _load_positions(query_positions_s, query_Q, s, 1 << 30, HAS_POSITIONS)
    last_position = tl.max(tl.where(query_Q < s, position_Q, -1), axis=0)
    factor_Q = tl.full([BLOCK_Q], log2_scale, tl.float32)
    if HAS_TAU:
        factor_Q *= tl.load(tau_s + query_Q, mask=query_Q < s, other=1.0)

    highest_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sum_Q = tl.zeros([BLOCK_Q], tl.float32)
    mixed_QC = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    end = S if HAS_POSITIONS else tl.minimum(S, first_query + BLOCK_Q)
    for first_key in range(0, end, BLOCK_K):
        key_K = first_key + tl.arange(0, BLOCK_K)
        position_K = _load_positions(key_positions_S, key_K, S, 0x7FFFFFFF, HAS_POSITIONS)
        is_needed = True
        if HAS_POSITIONS:
            is_needed = tl.min(position_K, axis=0) <= last_position
        if is_needed:
            k_KC = _load(k_Sbgc, key_K, S, b * g, kv_head, c, BLOCK_C)
            products_QK = tl.dot(q_QC, tl.trans(k_KC), input_precision="ieee")
            log2_QK = factor_Q[:, None] * _squash(products_QK, scale, HAS_CAP)
            log2_QK = tl.where(position_K[None, :] <= position_Q[:, None], log2_QK, float("-inf"))
            new_highest_Q = tl.maximum(highest_Q, tl.max(log2_QK, axis=1))
            # Before a query's first key both are -inf, and their difference would be NaN.
            shift_Q = tl.where(new_highest_Q == float("-inf"), 0.0, new_highest_Q)
            weights_QK = tl.exp2(log2_QK - shift_Q[:, None])
            shrink_Q = tl.exp2(highest_Q - shift_Q)
            sum_Q = sum_Q * shrink_Q + tl.sum(weights_QK, axis=1)
            v_KC = _load(v_Sbgc, key_K, S, b * g, kv_head, c, BLOCK_C)
            mixed_QC = mixed_QC * shrink_Q[:, None]
            mixed_QC += tl.dot(weights_QK.to(v_KC.dtype), v_KC, input_precision="ieee")
            highest_Q = new_highest_Q
    _store(result_sbhc, mixed_QC / sum_Q[:, None], query_Q, s, b * h, batch_head, c, BLOCK_C)
    sums = log2_sums_bhs + batch_head.to(tl.int64) * s + query_Q
    tl.store(sums, highest_Q + tl.log2(sum_Q), mask=query_Q < s)


@triton.jit
def _inner(
    result_sbhc, grad_sbhc, inner_bhs, s, heads, c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """<result, gradient> of each query and head; rows R of [s, b * h] come out as [b * h, s]."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    result_RC = _load(result_sbhc, row_R, heads * s, 1, 0, c, BLOCK_C).to(tl.float32)
    grad_RC = _load(grad_sbhc, row_R, heads * s, 1, 0, c, BLOCK_C).to(tl.float32)
    inner_R = tl.sum(result_RC * grad_RC, axis=1)
    tl.store(inner_bhs + (row_R % heads) * s + row_R // heads, inner_R, mask=row_R < heads * s)


@triton.jit
def _backward_of_queries(
    q_sbhc, k_Sbgc, v_Sbgc, grad_sbhc, log2_sums_bhs, inner_bhs, grad_q_sbhc, slope,
    tau_s, query_positions_s, key_positions_S, s, S, b, h, g, c, scale, log2_scale,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    batch_head = tl.program_id(1)
    kv_head = (batch_head // h) * g + (batch_head % h) // (h // g)
    query_Q = first_query + tl.arange(0, BLOCK_Q)
    q_QC = _load(q_sbhc, query_Q, s, b * h, batch_head, c, BLOCK_C)
    grad_QC = _load(grad_sbhc, query_Q, s, b * h, batch_head, c, BLOCK_C)
    # Queries beyond the last see nothing here.
    position_Q = _load_positions(query_positions_s, query_Q, s, -1, HAS_POSITIONS)
    last_position = tl.max(position_Q, axis=0)
    of_query = batch_head.to(tl.int64) * s + query_Q
    log2_sum_Q = tl.load(log2_sums_bhs + of_query, mask=query_Q < s, other=0.0)
    inner_Q = tl.load(inner_bhs + of_query, mask=query_Q < s, other=0.0)
    tau_Q = tl.full([BLOCK_Q], 1.0, tl.float32)
    if HAS_TAU:
        tau_Q = tl.load(tau_s + query_Q, mask=query_Q < s, other=1.0)

    grad_q_QC = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    end = S if HAS_POSITIONS else tl.minimum(S, first_query + BLOCK_Q)
    for first_key in range(0, end, BLOCK_K):
        key_K = first_key + tl.arange(0, BLOCK_K)
        position_K = _load_positions(key_positions_S, key_K, S, 0x7FFFFFFF, HAS_POSITIONS)
        is_needed = True
        if HAS_POSITIONS:
            is_needed = tl.min(position_K, axis=0) <= last_position
        if is_needed:
            k_KC = _load(k_Sbgc, key_K, S, b * g, kv_head, c, BLOCK_C)
            v_KC = _load(v_Sbgc, key_K, S, b * g, kv_head, c, BLOCK_C)
            squashed_QK = _squash(tl.dot(q_QC, tl.trans(k_KC), input_precision="ieee"), scale, HAS_CAP)
            log2_QK = (tau_Q * log2_scale)[:, None] * squashed_QK - log2_sum_Q[:, None]
            is_seen_QK = position_K[None, :] <= position_Q[:, None]
            weights_QK = tl.exp2(tl.where(is_seen_QK, log2_QK, float("-inf")))
            grad_weights_QK = tl.dot(grad_QC, tl.trans(v_KC), input_precision="ieee")
            grad_scores_QK = weights_QK * (grad_weights_QK - inner_Q[:, None])
            if HAS_CAP:
                grad_scores_QK *= squashed_QK * (1.0 - squashed_QK)
            grad_q_QC += tl.dot(grad_scores_QK.to(k_KC.dtype), k_KC, input_precision="ieee")
    _store(grad_q_sbhc, grad_q_QC * (tau_Q * slope)[:, None], query_Q, s, b * h, batch_head, c, BLOCK_C)


@triton.jit
def _backward_of_keys(
    q_sbhc, k_Sbgc, v_Sbgc, grad_sbhc, log2_sums_bhs, inner_bhs, grad_k_Sbgc, grad_v_Sbgc, slope,
    tau_s, query_positions_s, key_positions_S, s, S, b, h, g, c, scale, log2_scale,
    HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Tiles are [K, Q] here: both products of the walk then take them as they are.
    first_key = tl.program_id(0) * BLOCK_K
    batch_kv = tl.program_id(1)
    heads = h // g
    first_head = (batch_kv // g) * h + (batch_kv % g) * heads
    key_K = first_key + tl.arange(0, BLOCK_K)
    k_KC = _load(k_Sbgc, key_K, S, b * g, batch_kv, c, BLOCK_C)
    v_KC = _load(v_Sbgc, key_K, S, b * g, batch_kv, c, BLOCK_C)
    position_K = _load_positions(key_positions_S, key_K, S, 0x7FFFFFFF, HAS_POSITIONS)
    first_position = tl.min(position_K, axis=0)

    grad_k_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    grad_v_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    start = 0 if HAS_POSITIONS else (first_key // BLOCK_Q) * BLOCK_Q
    for batch_head in range(first_head, first_head + heads):
        for first_query in range(start, s, BLOCK_Q):
            query_Q = first_query + tl.arange(0, BLOCK_Q)
            position_Q = _load_positions(query_positions_s, query_Q, s, -1, HAS_POSITIONS)
            is_needed = True
            if HAS_POSITIONS:
                is_needed = tl.max(position_Q, axis=0) >= first_position
            if is_needed:
                q_QC = _load(q_sbhc, query_Q, s, b * h, batch_head, c, BLOCK_C)
                grad_QC = _load(grad_sbhc, query_Q, s, b * h, batch_head, c, BLOCK_C)
                of_query = tl.cast(batch_head, tl.int64) * s + query_Q
                log2_sum_Q = tl.load(log2_sums_bhs + of_query, mask=query_Q < s, other=0.0)
                inner_Q = tl.load(inner_bhs + of_query, mask=query_Q < s, other=0.0)
                tau_Q = tl.full([BLOCK_Q], 1.0, tl.float32)
                if HAS_TAU:
                    tau_Q = tl.load(tau_s + query_Q, mask=query_Q < s, other=1.0)
                squashed_KQ = _squash(tl.dot(k_KC, tl.trans(q_QC), input_precision="ieee"), scale, HAS_CAP)
                log2_KQ = (tau_Q * log2_scale)[None, :] * squashed_KQ - log2_sum_Q[None, :]
                is_seen_KQ = position_K[:, None] <= position_Q[None, :]
                weights_KQ = tl.exp2(tl.where(is_seen_KQ, log2_KQ, float("-inf")))
                grad_v_KC += tl.dot(weights_KQ.to(grad_QC.dtype), grad_QC, input_precision="ieee")
                grad_weights_KQ = tl.dot(v_KC, tl.trans(grad_QC), input_precision="ieee")
                grad_scores_KQ = weights_KQ * (grad_weights_KQ - inner_Q[None, :]) * tau_Q[None, :]
                if HAS_CAP:
                    grad_scores_KQ *= squashed_KQ * (1.0 - squashed_KQ)
                grad_k_KC += tl.dot(grad_scores_KQ.to(q_QC.dtype), q_QC, input_precision="ieee")
    _store(grad_k_Sbgc, grad_k_KC * slope, key_K, S, b * g, batch_kv, c, BLOCK_C)
    _store(grad_v_Sbgc, grad_v_KC, key_K, S, b * g, batch_kv, c, BLOCK_C)
