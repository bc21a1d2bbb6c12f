"""The router in Triton: all that follows the matmul in one pass over the logits, forward and backward each.

A program holds whole rows of logits in registers. Forward it makes soft-cap, scores, top-k, counts and all sums from
them; backward it makes them again, which is cheaper than to have kept them. Sums over tokens are written program by
program and summed by torch: no atomics, the same bits every time. Between equal scores the lower expert wins.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# T tokens, D hidden, E experts, K top-k, P programs

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.router.door import Routed, Scores, check_shapes
from megagrok.kernels.router.logits import gradients, make_logits

_MOST_EXPERTS = 4096
_BLOCK_ELEMENTS = 512
"""Logits that a program holds: few, so that 8,192 tokens of 8 experts still keep 128 programs busy."""


def route(
    x_TD: Tensor, weight_ED: Tensor, *, cap: float | None, top_k: int, scores: Scores, renormalize: bool
) -> Routed:
    """See `Router`. Raises KernelError also for more than 4,096 experts and for fp64."""
    check_shapes(x_TD, weight_ED, top_k)
    if len(weight_ED) > _MOST_EXPERTS:
        raise KernelError(
            f"router takes up to {_MOST_EXPERTS} experts, got {len(weight_ED)}. Fix: kernels.router=torch."
        )
    if x_TD.dtype == torch.float64:
        raise KernelError("router computes in fp32, x is fp64. Fix: kernels.router=torch.")
    return Routed(*_routed(x_TD, weight_ED, cap, top_k, scores == "sigmoid", renormalize))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, cap: float | None, top_k: int, is_sigmoid: bool, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits_TE = make_logits(x_TD, weight_ED)
        num_tokens, num_experts = logits_TE.shape
        tile = _tile(num_experts)
        programs = triton.cdiv(num_tokens, tile["BLOCK_T"])
        weights_TK = logits_TE.new_empty(num_tokens, top_k)
        experts_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
        counts_PE = logits_TE.new_empty(programs, num_experts, dtype=torch.int64)
        p_sum_PE, z_sum_P = logits_TE.new_empty(programs, num_experts), logits_TE.new_empty(programs)
        kinds = {"HAS_CAP": cap is not None, "IS_SIGMOID": is_sigmoid, "RENORMALIZE": renormalize, "K": top_k}
        _forward[(programs,)](
            logits_TE,
            weights_TK,
            experts_TK,
            counts_PE,
            p_sum_PE,
            z_sum_P,
            cap or 1.0,
            num_tokens,
            num_experts,
            BLOCK_K=triton.next_power_of_2(top_k),
            **kinds,
            **tile,
        )
        ctx.save_for_backward(x_TD, weight_ED, logits_TE, weights_TK, experts_TK)
        ctx.cap, ctx.kinds = cap or 1.0, kinds
        counts_E = counts_PE.sum(dim=0)
        ctx.mark_non_differentiable(experts_TK, counts_E)
        return weights_TK, experts_TK, counts_E, p_sum_PE.sum(dim=0), z_sum_P.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dweights_TK, _, _, dp_E, dz = grads
        x_TD, weight_ED, logits_TE, weights_TK, experts_TK = ctx.saved_tensors
        num_tokens, num_experts = logits_TE.shape
        tile = _tile(num_experts)
        dlogits_TE = torch.empty_like(logits_TE)
        _backward[(triton.cdiv(num_tokens, tile["BLOCK_T"]),)](
            logits_TE,
            weights_TK,
            experts_TK,
            dweights_TK.contiguous(),
            dp_E.contiguous(),
            dz,
            dlogits_TE,
            ctx.cap,
            num_tokens,
            num_experts,
            **ctx.kinds,
            **tile,
        )
        return *gradients(dlogits_TE, x_TD, weight_ED, ctx.needs_input_grad), None, None, None, None


_routed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _Route.apply


def _tile(num_experts: int) -> dict[str, int]:
    """Tokens and experts of a block."""
    experts = triton.next_power_of_2(num_experts)
    return {"BLOCK_T": max(_BLOCK_ELEMENTS // experts, 1), "BLOCK_E": experts, "num_warps": 4}


@triton.jit
def _tanh(x):
    """tanh and its slope, exact to a few roundings everywhere: near 0, where 1 - e^-2x cancels, tanh is its series up
    to x^11; far from it, where 1 - tanh^2 would cancel, the slope comes from the exponential."""
    square = x * x
    series = -17.0 / 315 + square * (62.0 / 2835 + square * (-1382.0 / 155925))
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * series)))
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    return tl.where(square < 0.1, series, tl.where(x < 0, -size, size)), slope


@triton.jit
def _likings(logits, in_E, cap, HAS_CAP: tl.constexpr, IS_SIGMOID: tl.constexpr):
    """Of raw logits [T, E]: the slope of the cap, scores, probabilities, softmax, and logsumexp [T, 1]."""
    slope = tl.full(logits.shape, 1.0, tl.float32)
    if HAS_CAP:
        tanh, slope = _tanh(logits / cap)
        logits = tanh * cap
    highest = tl.max(tl.where(in_E, logits, float("-inf")), axis=1)[:, None]
    exponentials = tl.where(in_E, tl.exp(logits - highest), 0.0)
    total = tl.sum(exponentials, axis=1)[:, None]
    softmax = exponentials / total
    scores, p = softmax, softmax
    if IS_SIGMOID:
        scores = tl.where(in_E, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
        p = scores / tl.sum(scores, axis=1)[:, None]
    return slope, scores, p, softmax, tl.log(total) + highest


@triton.jit
def _forward(
    logits_TE,
    weights_TK,
    experts_TK,
    counts_PE,
    p_sum_PE,
    z_sum_P,
    cap,
    T,
    E,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tokens, experts, choices = program * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    in_T, in_E, in_K = (tokens < T)[:, None], (experts < E)[None, :], (choices < K)[None, :]
    logits = tl.load(logits_TE + tokens[:, None] * E + experts[None, :], mask=in_T & in_E, other=0.0)
    _, scores, p, _, lse = _likings(logits, in_E, cap, HAS_CAP, IS_SIGMOID)

    # A score that is no number counts as 0 here, so that even then K different experts exist; its weight is none too.
    left = tl.where(in_E, tl.where(scores == scores, scores, 0.0), -1.0)
    best_weights = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    best_experts = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int64)
    for k in range(K):
        is_best = left == tl.max(left, axis=1)[:, None]
        expert = tl.min(tl.where(is_best, experts[None, :], BLOCK_E), axis=1)[:, None]
        is_chosen = experts[None, :] == expert
        weight = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1)[:, None]
        best_weights = tl.where(choices[None, :] == k, weight, best_weights)
        best_experts = tl.where(choices[None, :] == k, expert.to(tl.int64), best_experts)
        left = tl.where(is_chosen, -1.0, left)
    if RENORMALIZE:
        best_weights = best_weights / tl.sum(best_weights, axis=1)[:, None]
    at_TK, in_TK = tokens[:, None] * K + choices[None, :], in_T & in_K
    tl.store(weights_TK + at_TK, best_weights, mask=in_TK)
    tl.store(experts_TK + at_TK, best_experts, mask=in_TK)

    at_PE, in_row = program * E + experts, experts < E
    counts = tl.sum(tl.where(in_T & in_E & (left < 0), 1, 0), axis=0)
    tl.store(counts_PE + at_PE, counts.to(tl.int64), mask=in_row)
    tl.store(p_sum_PE + at_PE, tl.sum(tl.where(in_T, p, 0.0), axis=0), mask=in_row)
    tl.store(z_sum_P + program, tl.sum(tl.sum(tl.where(in_T, lse * lse, 0.0), axis=1), axis=0))


@triton.jit
def _backward(
    logits_TE,
    weights_TK,
    experts_TK,
    dweights_TK,
    dp_E,
    dz,
    dlogits_TE,
    cap,
    T,
    E,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The formulas are in torch_ops.py."""
    tokens, experts = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    is_token, in_E = tokens < T, (experts < E)[None, :]
    at_TE, in_TE = tokens[:, None] * E + experts[None, :], is_token[:, None] & in_E
    logits = tl.load(logits_TE + at_TE, mask=in_TE, other=0.0)
    cap_slope, scores, p, softmax, lse = _likings(logits, in_E, cap, HAS_CAP, IS_SIGMOID)

    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for k in range(K):
        weight = tl.load(weights_TK + tokens * K + k, mask=is_token, other=0.0)
        total += weight * tl.load(dweights_TK + tokens * K + k, mask=is_token, other=0.0)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for k in range(K):
        weight = tl.load(weights_TK + tokens * K + k, mask=is_token, other=0.0)
        slope = tl.load(dweights_TK + tokens * K + k, mask=is_token, other=0.0)
        if RENORMALIZE:
            slope -= total
        expert = tl.load(experts_TK + tokens * K + k, mask=is_token, other=-1)
        chosen += tl.where(experts[None, :] == expert[:, None], (weight * slope)[:, None], 0.0)

    dp = tl.load(dp_E + experts, mask=experts < E, other=0.0)[None, :]
    dlogits = p * (dp - tl.sum(p * dp, axis=1)[:, None]) + chosen
    if IS_SIGMOID:
        dlogits *= 1.0 - scores
    elif not RENORMALIZE:
        dlogits -= p * total[:, None]
    dlogits += softmax * (2.0 * tl.load(dz) * lse)
    tl.store(dlogits_TE + at_TE, dlogits * cap_slope, mask=in_TE)
