"""Context parallelism: which positions of a sequence a rank holds, and how keys and values meet again.

A causal sequence cut into C equal runs would leave the last rank with most of the work. So it is cut into 2C chunks
and rank r holds chunks r and 2C-1-r, as Megatron-core and ring attention implementations do.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrok.errors import ShapeError


def context_positions(seq_len: int, context_rank: int, context_size: int) -> Tensor:
    """Positions that `context_rank` holds, ascending, int64 [seq_len / context_size].

    Raises ShapeError if the sequence does not divide into 2 * context_size chunks.
    """
    if context_size == 1:
        return torch.arange(seq_len)
    if seq_len % (2 * context_size):
        raise ShapeError(f"sequence of {seq_len} positions, needs a multiple of 2 * context = {2 * context_size}")
    chunks = torch.arange(seq_len).chunk(2 * context_size)
    return torch.cat([chunks[context_rank], chunks[2 * context_size - 1 - context_rank]])


def gather_sequence(x_sX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts along dimension 0, in rank order; the backward pass sums and returns this rank's part.

    Collective over `group`; differentiable. The rows follow `context_positions` of rank 0, 1, ...
    """
    if dist.get_world_size(group) == 1:
        return x_sX
    gathered: Tensor = _GatherSequence.apply(x_sX, group)
    return gathered


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        part = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None
