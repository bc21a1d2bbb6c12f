"""Bring each token to its experts and back. Drops nothing.

On one expert rank nothing moves: the experts pick their tokens out of x themselves, and add up what they make of them.
On several, rows travel:

    tokens --sort--> rows by expert --exchange--> rows by (source rank, local expert), which the experts pick from
    and put back in place --exchange--> rows by expert --gather and sum--> tokens

A row's weight travels beside it, so that the experts fold it in, and nobody keeps their results for its gradient.
"""

# T this rank's tokens, K top-k, D hidden, E experts, e = E / ep experts of this rank, R rows that this rank computes,
# N rows of what they are picked from: T on one rank, R on several

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrok.kernels.permute import Permute


@dataclass(frozen=True, slots=True)
class Journey:
    """What `combine` needs to bring rows home."""

    sent: list[int]
    received: list[int]
    inverse_TK: Tensor
    """(token, choice) -> its row among those that this rank sent."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What this rank's experts work on: row r is source_R[r] of x_ND; rows sorted by local expert."""

    x_ND: Tensor
    source_R: Tensor
    weight_R: Tensor
    rows_per_expert: list[int]
    """Rows of each local expert, on the host; sums to R."""
    journey: Journey | None
    """None where nothing travelled."""


def dispatch(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    tokens_per_expert_E: Tensor,
    group: dist.ProcessGroup,
    permute: Permute,
) -> Dispatched:
    """Send every (token, choice) pair to the rank that owns its expert.

    Collective over `group`, also with T = 0; its size divides E. Differentiable in x_TD and weights_TK. Waits on the
    host once, for the row counts. tokens_per_expert_E: int64 counts of experts_TK.
    """
    num_tokens, top_k = experts_TK.shape
    order_R = experts_TK.flatten().argsort(stable=True)
    token_R, weight_R = order_R // top_k, weights_TK.flatten().index_select(0, order_R)
    size = dist.get_world_size(group)
    if size == 1:
        return Dispatched(x_TD, token_R, weight_R, tokens_per_expert_E.tolist(), None)
    incoming_E = torch.empty_like(tokens_per_expert_E)
    counting = dist.all_to_all_single(incoming_E, tokens_per_expert_E, group=group, async_op=True)
    inverse_TK = _inverse(order_R).view(num_tokens, top_k)
    x_RD = permute.permute(x_TD, token_R, inverse_TK)
    counting.wait()
    counts = torch.cat([incoming_E, tokens_per_expert_E]).tolist()
    local = len(incoming_E) // size
    received, sent = _sums(counts[: size * local], local), _sums(counts[size * local :], local)
    source_R = _by_expert(incoming_E.view(size, local), sum(received))
    x_ND, weight_N = _exchange(sent, received, group, x_RD, weight_R)
    return Dispatched(
        x_ND=x_ND,
        source_R=source_R,
        weight_R=weight_N.index_select(0, source_R),
        rows_per_expert=[sum(counts[expert : size * local : local]) for expert in range(local)],
        journey=Journey(sent, received, inverse_TK),
    )


def combine(y_ND: Tensor, dispatched: Dispatched, group: dist.ProcessGroup, permute: Permute) -> Tensor:
    """Send the experts' weighted results home and sum each token's K of them. The inverse of `dispatch`; collective.

    y_ND lies as dispatched.x_ND does. Returns [T, D] in its dtype; the sum is fp32.
    """
    journey = dispatched.journey
    if journey is None:
        return y_ND
    (rows_RD,) = _exchange(journey.received, journey.sent, group, y_ND)
    return permute.unpermute(rows_RD, journey.inverse_TK)


def _sums(counts: list[int], run: int) -> list[int]:
    """Of each `run` counts."""
    return [sum(counts[start : start + run]) for start in range(0, len(counts), run)]


def _by_expert(rows_re: Tensor, num_rows: int) -> Tensor:
    """Places of rows by (local expert, source rank) among rows by (source rank, local expert)."""
    num_ranks, num_experts = rows_re.shape
    expert_of_run = torch.arange(num_experts, device=rows_re.device).repeat(num_ranks)
    # Their number is known, so the host need not ask for it.
    return expert_of_run.repeat_interleave(rows_re.flatten(), output_size=num_rows).argsort(stable=True)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows, of all tensors at once; its backward pass is the all-to-all the other way."""

    @staticmethod
    def forward(
        ctx: Any, sent: list[int], received: list[int], group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(sent, received, group, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_all_to_all(ctx.received, ctx.sent, ctx.group, grads)


_exchange: Callable[..., tuple[Tensor, ...]] = _AllToAll.apply


def _all_to_all(
    sent: list[int], received: list[int], group: dist.ProcessGroup, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """All are on their way before the first is waited for."""
    outs = [tensor.new_empty(sum(received), *tensor.shape[1:]) for tensor in tensors]
    journeys = [
        dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group, async_op=True)
        for out, tensor in zip(outs, tensors, strict=True)
    ]
    for journey in journeys:
        journey.wait()
    return tuple(outs)
