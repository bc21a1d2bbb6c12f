"""Soft-capped causal attention in torch, block by block, so that the scores never lie whole in memory.

The one idea: a block of scores (some kv heads, a run of queries, the keys that they may see) is made, used and
forgotten while it is in the cache, in either direction; between the two only q, k, v, the result and each query's
log-sum-exp are kept. Elementwise passes are what a CPU loses its time in, so they are few and cheap ones:
tanh(x) = e / (e + 2) with e = expm1(2 x), as exact as torch.tanh and twice as fast, and exp(x) = exp2(x / log 2).
Not for ever larger GPUs: there a block is a handful of launches, and kernel.py has one.
"""

# s queries, S keys, b micro-batch, h query heads, g kv heads, r = h / g, c head width, n = b * g kv heads of all
# sequences, m of them in a block, u queries in a block, q = r * u its rows, K keys that they may see

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagrok.kernels.attention.shapes import LOG2_E, check_shapes

# Bytes of scores in one block: on a CPU what stays in its cache, elsewhere what makes a launch worth its time.
CPU_BLOCK_BYTES = 1 << 20
DEVICE_BLOCK_BYTES = 1 << 28
# A run of queries sees the keys up to its last one, so long runs make scores that are masked; short ones cost calls.
SHORTEST_RUN = 64
MOST_RUNS = 32


def attention(
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    v_Sbgc: Tensor,
    *,
    cap: float | None,
    tau_s: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `megagrok.kernels.attention.Attention` says; any shapes, any floating dtype, any device, also fake tensors."""
    check_shapes(q_sbhc, k_Sbgc, v_Sbgc, cap, tau_s, positions)
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
        problem = _Problem(q_sbhc, k_Sbgc, cap, tau_s, positions)
        result_sbhc = torch.empty_like(q_sbhc, memory_format=torch.contiguous_format)
        log2_sums_nrs = q_sbhc.new_empty(problem.n, problem.r, problem.s, 1, dtype=problem.wide)
        _mix(problem, q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_nrs)
        ctx.cap = cap
        ctx.save_for_backward(q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_nrs, tau_s, *(positions or ()))
        return result_sbhc.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_nrs, tau_s, *rest = ctx.saved_tensors
        positions = (rest[0], rest[1]) if rest else None
        problem = _Problem(q_sbhc, k_Sbgc, ctx.cap, tau_s, positions)
        grad_sbhc = grads[0].reshape(q_sbhc.shape)
        dq, dk, dv = _unmix(problem, q_sbhc, k_Sbgc, v_Sbgc, result_sbhc, log2_sums_nrs, grad_sbhc)
        return dq, dk, dv, None, None, None


_attention: Callable[..., Tensor] = _Attention.apply


@dataclass(frozen=True, slots=True)
class _Block:
    """Kv heads [head, last_head), queries [start, end), keys [0, num_keys)."""

    head: int
    last_head: int
    start: int
    end: int
    num_keys: int


class _Problem:
    """Sizes, factors and masks that both directions share."""

    def __init__(
        self,
        q_sbhc: Tensor,
        k_Sbgc: Tensor,
        cap: float | None,
        tau_s: Tensor | None,
        positions: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.s, b, h, self.c = q_sbhc.shape
        self.S, _, g, _ = k_Sbgc.shape
        self.n, self.r = b * g, h // g
        self.cap, self.positions = cap, positions
        self.device = q_sbhc.device
        self.wide = torch.promote_types(q_sbhc.dtype, torch.float32)
        self.tau_s1 = None if tau_s is None else tau_s.to(self.wide)[:, None]
        # Of the product q k: into expm1, whose argument is twice that of the tanh.
        self.scale = self.c**-0.5 if cap is None else self.c**-0.5 * 2 / cap
        # From there to log2 of the unnormalised weight.
        self.log2_scale = LOG2_E if cap is None else LOG2_E * cap
        self.slope = self.c**-0.5
        # Blocks are made in the same memory again and again: it is in the cache, and no page of it is new.
        self.run = max(SHORTEST_RUN, math.ceil(self.s / MOST_RUNS))
        bytes_of_head = min(self.run, self.s) * self.S * self.r * self.wide.itemsize
        budget = CPU_BLOCK_BYTES if self.device.type == "cpu" else DEVICE_BLOCK_BYTES
        self.heads = max(1, min(self.n, budget // max(1, bytes_of_head)))
        self.scratch = q_sbhc.new_empty(3, self.heads * bytes_of_head // self.wide.itemsize, dtype=self.wide)
        longest = min(self.run, self.s)
        self.run_bias_uu = q_sbhc.new_full((longest, longest), -math.inf, dtype=self.wide).triu_(1)

    def blocks(self) -> Iterator[_Block]:
        """Runs of queries within groups of heads, so that the gradients of keys and values stay near."""
        for head in range(0, self.n, self.heads):
            for start in range(0, self.s, self.run):
                end = min(start + self.run, self.s)
                num_keys = end if self.positions is None else self.S
                yield _Block(head, min(head + self.heads, self.n), start, end, num_keys)

    def space(self, number: int, block: _Block) -> Tensor:
        """One of the three places for what has the shape of a block's scores, [m, q, K]; it holds anything."""
        shape = (block.last_head - block.head, (block.end - block.start) * self.r, block.num_keys)
        return self.scratch[number, : math.prod(shape)].view(shape)

    def squash(self, q_mqc: Tensor, k_mKc: Tensor, squashed_mqK: Tensor) -> None:
        """Write tanh(q k / sqrt(c) / cap), or q k / sqrt(c) without a cap."""
        _write_product(q_mqc, k_mKc.mT, self.scale, squashed_mqK)
        if self.cap is not None:
            squashed_mqK.clamp_(max=40.0).expm1_()
            squashed_mqK.div_(squashed_mqK + 2.0)

    def mask(self, scores_mqK: Tensor, block: _Block) -> None:
        """Write -inf where a key is later than the query."""
        scores_mruK = self.by_query(scores_mqK, block)
        if self.positions is None:
            # Keys before the run are early enough for all of it.
            u = block.end - block.start
            scores_mruK[..., block.start :].add_(self.run_bias_uu[:u, :u])
        else:
            scores_mruK.add_(self._bias(self.positions[0][block.start : block.end], self.positions[1]))

    def _bias(self, positions_u: Tensor, positions_K: Tensor) -> Tensor:
        is_later_uK = positions_K[None, :] > positions_u[:, None]
        return torch.zeros_like(is_later_uK, dtype=self.wide).masked_fill_(is_later_uK, -math.inf)

    def by_query(self, x_mqX: Tensor, block: _Block) -> Tensor:
        """View of rows as [m, r, u, X]."""
        return x_mqX.view(x_mqX.shape[0], self.r, block.end - block.start, x_mqX.shape[2])

    def rows(self, x_sbhc: Tensor, block: _Block) -> Tensor:
        """Copy of a block's queries, or of what has their shape: [m, q, c]."""
        x_unrc = x_sbhc[block.start : block.end].reshape(-1, self.n, self.r, self.c)
        x_mruc = x_unrc[:, block.head : block.last_head].permute(1, 2, 0, 3)
        return x_mruc.reshape(block.last_head - block.head, -1, self.c)

    def view(self, x_sbhc: Tensor, block: _Block) -> Tensor:
        """The same rows where they lie: [m, r, u, c]."""
        x_umrc = x_sbhc.view(self.s, self.n, self.r, self.c)[block.start : block.end, block.head : block.last_head]
        return x_umrc.permute(1, 2, 0, 3)

    def tau(self, block: _Block) -> Tensor | float:
        """Factor of each query of a block: [u, 1], or 1."""
        return 1.0 if self.tau_s1 is None else self.tau_s1[block.start : block.end]

    def by_head(self, x_Sbgc: Tensor) -> Tensor:
        """[n, S, c], each head's keys or values in a row."""
        return x_Sbgc.reshape(self.S, self.n, self.c).transpose(0, 1).contiguous()


def _mix(
    problem: _Problem, q_sbhc: Tensor, k_Sbgc: Tensor, v_Sbgc: Tensor, result_sbhc: Tensor, log2_sums_nrs1: Tensor
) -> None:
    """Fill in the result, and log2 of each query's sum of weights as the backward pass makes them again."""
    k_nSc, v_nSc = problem.by_head(k_Sbgc), problem.by_head(v_Sbgc)
    for block in problem.blocks():
        heads = slice(block.head, block.last_head)
        k_mKc, v_mKc = k_nSc[heads, : block.num_keys], v_nSc[heads, : block.num_keys]
        scores_mqK = problem.space(0, block)
        problem.squash(problem.rows(q_sbhc, block), k_mKc, scores_mqK)
        problem.mask(scores_mqK, block)
        if problem.tau_s1 is not None:
            problem.by_query(scores_mqK, block).mul_(problem.tau(block))
        highest_mq1 = scores_mqK.amax(dim=-1, keepdim=True).mul_(problem.log2_scale)
        weights_mqK = torch.sub(scores_mqK.mul_(problem.log2_scale), highest_mq1, out=scores_mqK).exp2_()
        sums_mq1 = weights_mqK.sum(dim=-1, keepdim=True)
        mixed_mqc = torch.bmm(weights_mqK.to(v_mKc.dtype), v_mKc)
        view_mruc = problem.view(result_sbhc, block)
        torch.div(problem.by_query(mixed_mqc, block), problem.by_query(sums_mq1, block), out=view_mruc)
        log2_sums_mq1 = sums_mq1.log2_().add_(highest_mq1)
        log2_sums_nrs1[heads, :, block.start : block.end] = problem.by_query(log2_sums_mq1, block)


def _unmix(
    problem: _Problem,
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    v_Sbgc: Tensor,
    result_sbhc: Tensor,
    log2_sums_nrs1: Tensor,
    grad_sbhc: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of keys and values gather in fp32, transposed: so their products run faster."""
    dtype, wide = q_sbhc.dtype, problem.wide
    k_nSc, v_nSc = problem.by_head(k_Sbgc), problem.by_head(v_Sbgc)
    grad_q_sbhc = torch.empty_like(q_sbhc, memory_format=torch.contiguous_format)
    grad_k_ncS, grad_v_ncS = q_sbhc.new_zeros(2, problem.n, problem.c, problem.S, dtype=wide)
    inner_sX = (grad_sbhc * result_sbhc).sum(dim=-1, dtype=wide)
    inner_nrs1 = inner_sX.view(problem.s, problem.n, problem.r, 1).permute(1, 2, 0, 3)
    for block in problem.blocks():
        heads = slice(block.head, block.last_head)
        k_mKc, v_mKc = k_nSc[heads, : block.num_keys], v_nSc[heads, : block.num_keys]
        q_mqc, grad_mqc = problem.rows(q_sbhc, block), problem.rows(grad_sbhc, block)
        squashed_mqK, weights_mqK, grad_scores_mqK = (problem.space(number, block) for number in range(3))
        problem.squash(q_mqc, k_mKc, squashed_mqK)
        _weigh_again(problem, squashed_mqK, log2_sums_nrs1, block, weights_mqK)
        _add_product(grad_v_ncS[heads, :, : block.num_keys], grad_mqc.mT, weights_mqK.to(dtype))
        _write_product(grad_mqc, v_mKc.mT, 1.0, grad_scores_mqK)
        problem.by_query(grad_scores_mqK, block).sub_(inner_nrs1[heads, :, block.start : block.end])
        grad_scores_mqK.mul_(weights_mqK)
        if problem.cap is not None:
            torch.ops.aten.tanh_backward.grad_input(grad_scores_mqK, squashed_mqK, grad_input=grad_scores_mqK)
        slope = problem.tau(block) * problem.slope
        narrow_mqK = grad_scores_mqK.to(dtype)
        grad_q_mruc = problem.by_query(torch.bmm(narrow_mqK, k_mKc), block)
        torch.mul(grad_q_mruc, slope, out=problem.view(grad_q_sbhc, block))
        steep_mqc = (problem.by_query(q_mqc, block) * slope).to(dtype).view(q_mqc.shape)
        _add_product(grad_k_ncS[heads, :, : block.num_keys], steep_mqc.mT, narrow_mqK)
    b, g = k_Sbgc.shape[1:3]
    grad_k_Sbgc, grad_v_Sbgc = (
        x_ncS.permute(2, 0, 1).reshape(problem.S, b, g, problem.c).to(dtype) for x_ncS in (grad_k_ncS, grad_v_ncS)
    )
    return grad_q_sbhc, grad_k_Sbgc, grad_v_Sbgc


def _weigh_again(
    problem: _Problem, squashed_mqK: Tensor, log2_sums_nrs1: Tensor, block: _Block, weights_mqK: Tensor
) -> None:
    """Write the weights of a block as the forward pass had them, divided by their sums."""
    sums_mru1 = log2_sums_nrs1[block.head : block.last_head, :, block.start : block.end]
    factor = problem.tau(block) * problem.log2_scale
    log2_mruK = problem.by_query(weights_mqK, block)
    torch.mul(problem.by_query(squashed_mqK, block), factor, out=log2_mruK).sub_(sums_mru1)
    problem.mask(weights_mqK, block)
    weights_mqK.exp2_()


def _write_product(a_mqc: Tensor, b_mcK: Tensor, factor: float, product_mqK: Tensor) -> None:
    """product = factor a b; straight where the product has their dtype."""
    if product_mqK.dtype == a_mqc.dtype:
        torch.baddbmm(product_mqK, a_mqc, b_mcK, beta=0, alpha=factor, out=product_mqK)
    else:
        any_mqK = a_mqc.new_empty(()).expand(product_mqK.shape)
        product_mqK.copy_(torch.baddbmm(any_mqK, a_mqc, b_mcK, beta=0, alpha=factor))


def _add_product(sum_mcK: Tensor, a_mcq: Tensor, b_mqK: Tensor) -> None:
    """sum += a b; in one step where the sum has their dtype."""
    if sum_mcK.dtype == a_mcq.dtype:
        torch.baddbmm(sum_mcK, a_mcq, b_mqK, out=sum_mcK)
    else:
        sum_mcK.add_(torch.bmm(a_mcq, b_mqK))
