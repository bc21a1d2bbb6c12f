"""Balanced routing for benchmarks: each expert gets the same number of tokens, whatever the router thinks.

Not a setting: nobody should train so. It is a hook on the routers of one engine, which a benchmark's own process adds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from megagrok.model.moe.router import Router, Routing


@contextmanager
def routers_built() -> Iterator[list[Router]]:
    """The routers that are made into modules inside the block."""
    found: list[Router] = []

    def notice(_parent: nn.Module, _name: str, module: nn.Module | None) -> None:
        if isinstance(module, Router):
            found.append(module)

    handle = register_module_module_registration_hook(notice)
    try:
        yield found
    finally:
        handle.remove()


def balance(router: Router) -> None:
    """From now on send the tokens round the experts in turn; weights and losses stay those that the router computes."""
    router.register_forward_hook(lambda _router, _inputs, routing: balanced(routing))


def balanced(routing: Routing) -> Routing:
    """The same call with choice k of token t at expert (t K + k) mod E. A token's K experts differ, since K <= E."""
    num_experts = routing.tokens_per_expert_E.numel()
    choices = torch.arange(routing.experts_TK.numel(), device=routing.experts_TK.device) % num_experts
    return replace(
        routing,
        experts_TK=choices.view_as(routing.experts_TK),
        tokens_per_expert_E=choices.bincount(minlength=num_experts),
    )
