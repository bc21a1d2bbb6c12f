"""Balanced routing: every expert gets the same, no token meets an expert twice, nothing else of the call changes."""

import pytest
import torch

from megagrok.bench.routing import balanced
from megagrok.model.moe.router import Routing


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(8, 4, 2), (16, 8, 2), (12, 4, 4), (5, 4, 3)])
def test_tokens_go_round_the_experts(tokens: int, experts: int, top_k: int) -> None:
    weights = torch.rand(tokens, top_k)
    everything_to_one = torch.zeros(tokens, top_k, dtype=torch.int64)
    zero = torch.zeros(())
    routing = Routing(weights, everything_to_one, torch.zeros(experts, dtype=torch.int64), zero, zero)
    even = balanced(routing)
    assert even.weights_TK is weights
    assert int(even.tokens_per_expert_E.sum()) == tokens * top_k
    assert int(even.tokens_per_expert_E.max() - even.tokens_per_expert_E.min()) <= 1
    assert all(len(set(row)) == top_k for row in even.experts_TK.tolist())
    assert torch.equal(even.experts_TK.flatten().bincount(minlength=experts), even.tokens_per_expert_E)
