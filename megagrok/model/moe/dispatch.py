"""Bring each token to its experts and back: sort by expert, exchange over the expert ranks, sort again. Drops nothing.

    tokens --sort--> rows by expert --exchange--> rows by (source rank, local expert) --regroup--> rows by local expert

`combine` walks the same way back and sums a token's K results, weighted.
"""

# T this rank's tokens, K top-k, D hidden, E experts, e = E / ep experts of this rank, R rows that this rank computes

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows sorted by local expert, and what `combine` needs to undo it."""

    rows_RD: Tensor
    rows_per_expert: list[int]
    """Rows of each local expert, on the host; sums to R."""
    order: Tensor
    """Sorted row -> index of the (token, choice) pair in T * K."""
    sent: list[int]
    received: list[int]
    regroup: Tensor | None


def dispatch(x_TD: Tensor, experts_TK: Tensor, tokens_per_expert_E: Tensor, group: dist.ProcessGroup) -> Dispatched:
    """Send every (token, choice) pair to the rank that owns its expert.

    Collective over `group`, also with T = 0; its size divides E. Differentiable in x_TD. Waits on the host once, for
    the row counts. tokens_per_expert_E: int64 counts of experts_TK.
    """
    top_k = experts_TK.shape[1]
    order = experts_TK.flatten().argsort(stable=True)
    rows = x_TD.index_select(0, order // top_k)
    size = dist.get_world_size(group)
    if size == 1:
        counts = tokens_per_expert_E.tolist()
        return Dispatched(rows, counts, order, [len(rows)], [len(rows)], None)
    incoming_E = torch.empty_like(tokens_per_expert_E)
    dist.all_to_all_single(incoming_E, tokens_per_expert_E, group=group)
    incoming_re = incoming_E.view(size, -1)
    on_host = torch.stack([tokens_per_expert_E.view(size, -1).sum(1), incoming_re.sum(1)]).tolist()
    sent, received = on_host[0], on_host[1]
    arrived = _exchange(rows, sent, received, group)
    regroup = _by_expert(incoming_re)
    return Dispatched(arrived.index_select(0, regroup), incoming_re.sum(0).tolist(), order, sent, received, regroup)


def combine(rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched, group: dist.ProcessGroup) -> Tensor:
    """Send the experts' results home and sum each token's K of them, weighted. The inverse of `dispatch`; collective.

    Returns [T, D] in the rows' dtype; the weighted sum is fp32.
    """
    if dispatched.regroup is not None:
        ungrouped = rows_RD.index_select(0, _inverse(dispatched.regroup))
        rows_RD = _exchange(ungrouped, dispatched.received, dispatched.sent, group)
    num_tokens, top_k = weights_TK.shape
    rows_TKD = rows_RD.index_select(0, _inverse(dispatched.order)).view(num_tokens, top_k, rows_RD.shape[1])
    # Not a product of T small matrices: their backward pass takes three times as long on a CPU.
    return (weights_TK[:, :, None] * rows_TKD).sum(dim=1).to(rows_RD.dtype)


def _by_expert(rows_re: Tensor) -> Tensor:
    """Permutation from rows ordered by (source rank, local expert) to rows ordered by (local expert, source rank)."""
    num_ranks, num_experts = rows_re.shape
    expert_of_run = torch.arange(num_experts, device=rows_re.device).repeat(num_ranks)
    return expert_of_run.repeat_interleave(rows_re.flatten()).argsort(stable=True)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Uneven all-to-all of rows; its backward pass is the all-to-all the other way."""
    exchanged: Tensor = _AllToAll.apply(rows, sent, received, group)
    return exchanged


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        out = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None
