"""Attention in blocks of queries is attention, forward and backward: every length, every switch."""

import math
from dataclasses import replace

import pytest
import tolerance
import torch
from layouts import MODEL, make_run, start
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import ModelConfig
from megagrok.model.attention import SoftcapAttention
from megagrok.model.transformer_config import make_transformer_config
from megagrok.parallel.ranks import Ranks
from megagrok.platform import find_platform

HEADS, KV_HEADS, WIDTH, MICRO_BATCH = 6, 2, 8, 2
# One block, blocks of one length, a last block of another, and more queries than the shortest blocks hold.
LENGTHS = (1, 63, 64, 65, 200, 700)
SWITCHES = {
    "plain": replace(MODEL, attention_softcap=None, attention_temperature_positions=None),
    "capped": replace(MODEL, attention_softcap=2.0, attention_temperature_positions=None),
    "capped and sharpened": replace(MODEL, attention_softcap=2.0, attention_temperature_positions=50),
    "sharpened": replace(MODEL, attention_softcap=None, attention_temperature_positions=50),
}


def inputs(length: int) -> list[Tensor]:
    """Query, key, value and the output's gradient; scores of a few units, so that the cap bends them."""
    stream = torch.Generator().manual_seed(length)
    shapes = [(HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH), (HEADS * WIDTH,)]
    return [2 * torch.randn(length, MICRO_BATCH, *shape, generator=stream) for shape in shapes]


def by_definition(model: ModelConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula of SoftcapAttention over the whole square."""
    length = len(query)
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (key, value))
    scores = torch.einsum("ibhc,jbhc->bhij", query, key) / math.sqrt(WIDTH)
    if model.attention_softcap is not None:
        scores = torch.tanh(scores / model.attention_softcap) * model.attention_softcap
    if model.attention_temperature_positions is not None:
        first = model.attention_temperature_positions
        scores = scores * (torch.arange(length).clamp(min=first).double().log2() / math.log2(first))[:, None]
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhij,jbhc->ibhc", scores.softmax(dim=-1), value).flatten(2)


def output_and_gradients(attention: SoftcapAttention, length: int) -> list[Tensor]:
    *streams, gradient = inputs(length)
    leaves = [x.requires_grad_() for x in streams]
    output = attention(*leaves, None)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def all_lengths(ranks: Ranks) -> dict[str, dict[int, list[Tensor]]]:
    run = make_run()
    groups = start(run)
    results = {}
    for name, model in SWITCHES.items():
        config = make_transformer_config(replace(run, model=model), groups, find_platform())
        attention = SoftcapAttention(config, layer_number=1)
        results[name] = {length: output_and_gradients(attention, length) for length in LENGTHS}
    return results


@pytest.fixture(scope="module")
def computed() -> dict[str, dict[int, list[Tensor]]]:
    return run_ranks(all_lengths, 1)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SWITCHES)
def test_blocks_of_queries_do_not_change_attention(
    name: str, length: int, computed: dict[str, dict[int, list[Tensor]]]
) -> None:
    *streams, gradient = (x.double() for x in inputs(length))
    leaves = [x.requires_grad_() for x in streams]
    output = by_definition(SWITCHES[name], *leaves)
    output.backward(gradient)
    expected = [output.detach(), *(leaf.grad for leaf in leaves)]
    for fast, exact in zip(computed[name][length], expected, strict=True):
        assert (fast - exact).norm() <= tolerance.LAYOUT_GRADIENT * exact.norm()
