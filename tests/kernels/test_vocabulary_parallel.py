"""The cross-entropy over ranks that share the vocabulary is that of one: losses, and the parts of the gradients."""

import pytest
import tolerance
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from megagrok.kernels.cross_entropy import reference, torch_ops
from megagrok.parallel.ranks import Ranks

WORLD_SIZE = 2
CAPS = (None, 50.0, 200.0)
VOCAB_SIZE = 126


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Labels on either rank, one that does not count, and weights whose largest logits lie far apart on the ranks."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(61, 16, generator=generator)
    weight_VD = torch.randn(VOCAB_SIZE, 16, generator=generator) * 4
    weight_VD[: VOCAB_SIZE // WORLD_SIZE] *= 8
    labels_T = torch.randint(VOCAB_SIZE, (61,), generator=generator)
    labels_T[3] = reference.IGNORED_LABEL
    return hidden_TD, weight_VD, labels_T


def of_this_rank(ranks: Ranks) -> list[list[Tensor]]:
    """For every cap: sum, losses, this rank's parts of the gradients of hidden and weight, and its all-reduces."""
    torch_ops.CHUNK_BYTES["cpu"], torch_ops.FEWEST_TOKENS["cpu"] = 1, 16
    hidden_TD, weight_VD, labels_T = make_inputs()
    width = VOCAB_SIZE // WORLD_SIZE
    results = []
    for cap in CAPS:
        leaves = [hidden_TD.clone().requires_grad_(), weight_VD.split(width)[ranks.rank].clone().requires_grad_()]
        loss_sum, losses_T = torch_ops.cross_entropy(
            *leaves, labels_T, multiplier=0.5, cap=cap, group=dist.group.WORLD, first_token=ranks.rank * width
        )
        results.append([loss_sum.detach(), losses_T, *torch.autograd.grad(loss_sum, leaves)])
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[list[list[Tensor]]]:
    return run_ranks(of_this_rank, WORLD_SIZE)


@pytest.mark.parametrize("number", range(len(CAPS)), ids=[f"cap {cap}" for cap in CAPS])
def test_ranks_that_share_the_vocabulary_find_the_loss_and_gradients_of_one(by_rank, number):
    hidden_TD, weight_VD, labels_T = make_inputs()
    leaves = [hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()]
    loss_sum, losses_T = reference.cross_entropy(*leaves, labels_T, multiplier=0.5, cap=CAPS[number])
    wanted = [loss_sum.detach(), losses_T, *torch.autograd.grad(loss_sum, leaves)]
    first, second = (results[number] for results in by_rank)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    got = [first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]])]
    # A logit of up to the cap, or some hundreds, is off by that many roundings; so is a softmax, relative to itself.
    allowed = 2 * max(CAPS[number] or 0.0, 200.0) * tolerance.FP32_ROUNDING
    for result, want in zip(got, wanted, strict=True):
        assert (result.double() - want).norm() <= allowed * want.norm()
