"""Context ranks share out every position once and evenly in work, and keys meet again with their gradients."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from megagrok.errors import ShapeError
from megagrok.parallel.context import context_positions, gather_sequence
from megagrok.parallel.ranks import Ranks

SIZES = [(seq_len, size) for size in (1, 2, 3, 4, 8) for seq_len in (2 * size, 12 * size, 48 * size)]


@pytest.mark.parametrize(("seq_len", "size"), SIZES)
def test_positions_are_a_partition_of_the_sequence(seq_len: int, size: int) -> None:
    parts = [context_positions(seq_len, rank, size) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(seq_len))
    for part in parts:
        assert part.dtype == torch.int64 and len(part) == seq_len // size
        assert bool((part.diff() > 0).all())


@pytest.mark.parametrize(("seq_len", "size"), SIZES)
def test_causal_work_is_even(seq_len: int, size: int) -> None:
    """Position i attends to i + 1 keys; every rank has the same sum of them."""
    work = {int((context_positions(seq_len, rank, size) + 1).sum()) for rank in range(size)}
    assert work == {seq_len * (seq_len + 1) // 2 // size}


@pytest.mark.parametrize(("seq_len", "size"), [(6, 2), (10, 3), (2, 2)])
def test_a_sequence_that_does_not_divide_is_refused(seq_len: int, size: int) -> None:
    with pytest.raises(ShapeError, match=f"sequence of {seq_len} positions, needs a multiple of .* = {2 * size}"):
        context_positions(seq_len, 0, size)


def whole_sequence(seq_len: int) -> Tensor:
    return torch.arange(seq_len * 3, dtype=torch.float32).view(seq_len, 3)


def weights_of(rank: int, seq_len: int) -> Tensor:
    """What a rank makes of each gathered row: whole numbers, so that sums are exact in any order."""
    return torch.randint(-9, 9, (seq_len, 3), generator=torch.Generator().manual_seed(rank)).float()


def gather_and_go_back(ranks: Ranks, seq_len: int) -> tuple[Tensor, Tensor]:
    """This rank's view of the gathered rows, and the gradient of its own part."""
    part = context_positions(seq_len, ranks.rank, ranks.world_size)
    # Not contiguous, as heads are after a transpose.
    x_sX = whole_sequence(seq_len)[part].t().contiguous().t().requires_grad_()
    gathered = gather_sequence(x_sX, dist.group.WORLD)
    (gathered * weights_of(ranks.rank, seq_len)).sum().backward()
    return gathered.detach(), x_sX.grad


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathering_and_its_gradient_are_those_of_one_process(size: int) -> None:
    seq_len = 12
    results = run_ranks(gather_and_go_back, size, seq_len=seq_len)
    order = torch.cat([context_positions(seq_len, rank, size) for rank in range(size)])
    total_weight = torch.stack([weights_of(rank, seq_len) for rank in range(size)]).sum(0)
    for rank, (gathered, grad) in enumerate(results):
        assert torch.equal(gathered, whole_sequence(seq_len)[order])
        rows = seq_len // size
        assert torch.equal(grad, total_weight[rank * rows : (rank + 1) * rows])
