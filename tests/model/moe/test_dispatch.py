"""Conservation: a token reaches each of its experts exactly once and comes home, gradients too, whatever the loads."""

# T tokens of a rank, K choices, D width, E experts

from dataclasses import dataclass

import pytest
import tolerance
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from megagrok.kernels.permute import choose_permute
from megagrok.model.moe.dispatch import combine, dispatch
from megagrok.parallel.ranks import Ranks

NUM_EXPERTS, WIDTH = 4, 3
PERMUTE = choose_permute("auto", torch.device("cpu"))
# Tokens of each rank, choices a token, and the experts that may be chosen.
LOADS = {
    "even": ((8, 8), 2, (0, 1, 2, 3)),
    "uneven over ranks": ((3, 11), 2, (0, 1, 2, 3)),
    "an expert with no token": ((7, 6), 2, (0, 1, 3)),
    "a rank whose experts get nothing": ((5, 9), 2, (0, 1)),
    "all tokens on one expert": ((6, 4), 1, (2,)),
    "no token on one rank": ((0, 5), 2, (0, 1, 2, 3)),
    "no token on the other rank, all on its experts": ((5, 0), 1, (3,)),
    "no token anywhere": ((0, 0), 2, (0, 1, 2, 3)),
    "every expert": ((4, 5), 4, (0, 1, 2, 3)),
    "one token": ((1, 0), 1, (1,)),
}


@dataclass(frozen=True, slots=True)
class Sent:
    """What one rank sends: rows that say where they come from, their experts, and their weights."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor

    @property
    def counts_E(self) -> Tensor:
        return self.experts_TK.flatten().bincount(minlength=NUM_EXPERTS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank computed on, and what came home."""

    rows_RD: Tensor
    rows_per_expert: list[int]
    y_TD: Tensor
    x_grad_TD: Tensor
    weights_grad_TK: Tensor


def sent_by(rank: int, load: str) -> Sent:
    tokens_of_ranks, top_k, allowed = LOADS[load]
    num_tokens = tokens_of_ranks[rank] if rank < len(tokens_of_ranks) else 6
    stream = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(num_tokens, WIDTH, generator=stream)
    x_TD[:, 0] = torch.arange(num_tokens) + 1000 * (rank + 1)
    order_TE = torch.rand(num_tokens, len(allowed), generator=stream).argsort(dim=1)
    experts_TK = torch.tensor(allowed)[order_TE[:, :top_k]].view(num_tokens, top_k)
    return Sent(x_TD, experts_TK, torch.rand(num_tokens, top_k, generator=stream))


def expert_of(rows_D: Tensor, number: int) -> Tensor:
    """A different linear map for each expert, so that a row at the wrong one shows."""
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(number))
    return rows_D @ matrix


def go_and_return(ranks: Ranks, load: str) -> Outcome:
    sent = sent_by(ranks.rank, load)
    x_TD, weights_TK = sent.x_TD.clone().requires_grad_(), sent.weights_TK.clone().requires_grad_()
    group = dist.group.WORLD
    dispatched = dispatch(x_TD, sent.experts_TK, weights_TK, sent.counts_E, group, PERMUTE)
    local = NUM_EXPERTS // ranks.world_size
    rows_RD = dispatched.x_ND[dispatched.source_R]
    rows = rows_RD.split(dispatched.rows_per_expert)
    computed = torch.cat([expert_of(part, ranks.rank * local + number) for number, part in enumerate(rows)])
    weighted = computed * dispatched.weight_R[:, None]
    y_TD = combine(
        torch.zeros_like(dispatched.x_ND).index_add(0, dispatched.source_R, weighted), dispatched, group, PERMUTE
    )
    y_TD.square().sum().backward()
    return Outcome(rows_RD.detach(), dispatched.rows_per_expert, y_TD.detach(), x_TD.grad, weights_TK.grad)


@pytest.fixture(scope="module")
def everything() -> dict[int, dict[str, list[Outcome]]]:
    """All loads on one, two and four ranks: one fork each."""
    return {
        size: {load: [by_load[load] for by_load in by_rank] for load in LOADS}
        for size in (1, 2, 4)
        for by_rank in [run_ranks(all_loads, size)]
    }


def all_loads(ranks: Ranks) -> dict[str, Outcome]:
    return {load: go_and_return(ranks, load) for load in LOADS}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("load", LOADS)
def test_a_token_visits_each_of_its_experts_exactly_once(
    load: str, size: int, everything: dict[int, dict[str, list[Outcome]]]
) -> None:
    wanted = sorted(
        (float(token), int(expert))
        for rank in range(size)
        for sent in [sent_by(rank, load)]
        for token, experts_K in zip(sent.x_TD[:, 0], sent.experts_TK, strict=True)
        for expert in experts_K
    )
    visits = []
    for rank, outcome in enumerate(everything[size][load]):
        assert sum(outcome.rows_per_expert) == len(outcome.rows_RD)
        assert len(outcome.rows_per_expert) == NUM_EXPERTS // size
        rows = outcome.rows_RD.split(outcome.rows_per_expert)
        for number, part in enumerate(rows):
            visits += [(float(token), rank * len(rows) + number) for token in part[:, 0]]
    assert sorted(visits) == wanted


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("load", LOADS)
def test_what_comes_home_is_the_weighted_sum_and_so_are_gradients(
    load: str, size: int, everything: dict[int, dict[str, list[Outcome]]]
) -> None:
    for rank, outcome in enumerate(everything[size][load]):
        sent = sent_by(rank, load)
        x_TD, weights_TK = sent.x_TD.clone().requires_grad_(), sent.weights_TK.clone().requires_grad_()
        of_every_expert = torch.stack([expert_of(x_TD, number) for number in range(NUM_EXPERTS)], dim=1)
        chosen_TKD = of_every_expert.gather(1, sent.experts_TK[..., None].expand(-1, -1, WIDTH))
        y_TD = (chosen_TKD * weights_TK[..., None]).sum(1)
        y_TD.square().sum().backward()
        for actual, expected in (
            (outcome.y_TD, y_TD.detach()),
            (outcome.x_grad_TD, x_TD.grad),
            (outcome.weights_grad_TK, weights_TK.grad),
        ):
            assert actual.shape == expected.shape
            # Sums of K products of WIDTH terms, in another order.
            assert float((actual - expected).norm()) <= tolerance.fp32_sum(terms=12) * float(expected.norm())


def sum_in_bf16(ranks: Ranks) -> float:
    """Share of the outputs that are the exact sum of the rows that came home, rounded once."""
    stream = torch.Generator().manual_seed(ranks.rank)
    x_TD = torch.randn(500, 8, generator=stream).to(torch.bfloat16)
    experts_TK = torch.arange(NUM_EXPERTS).expand(500, -1)
    weights_TK = torch.ones(500, NUM_EXPERTS)
    counts_E = experts_TK.flatten().bincount(minlength=NUM_EXPERTS)
    dispatched = dispatch(x_TD, experts_TK, weights_TK, counts_E, dist.group.WORLD, PERMUTE)
    local = NUM_EXPERTS // ranks.world_size
    factors_R = torch.arange(1 + ranks.rank * local, 1 + (1 + ranks.rank) * local).repeat_interleave(1000)
    rows_RD = dispatched.x_ND[dispatched.source_R] * factors_R[:, None]
    y_ND = torch.empty_like(dispatched.x_ND).index_copy(0, dispatched.source_R, rows_RD)
    y_TD = combine(y_ND, dispatched, dist.group.WORLD, PERMUTE)
    exact_TD = (x_TD[:, None, :] * torch.arange(1, 1 + NUM_EXPERTS)[None, :, None]).double().sum(1)
    return float((y_TD == exact_TD.to(torch.bfloat16)).double().mean())


def test_bf16_rows_that_come_home_are_summed_in_fp32() -> None:
    """A sum in bf16 would miss by an ulp about every second time."""
    assert min(run_ranks(sum_in_bf16, 2)) > 0.999
