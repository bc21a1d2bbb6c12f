"""The map from a rank's parameters to global tensors: it covers every element once, whoever holds it, and first values
laid down through it are the reference's on every rank."""

from dataclasses import replace

import pytest
import torch
from layouts import MODEL, RESIDUAL, TIED, copies, make_run, of_kind, start, whole
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import ModelConfig, ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.model.init import initial_value
from megagrok.model.names import EMBEDDING, parameter_shapes
from megagrok.parallel.ranks import Ranks
from megagrok.platform import find_platform

DEEP = replace(MODEL, num_layers=4)
LAYOUTS = {
    "one rank": (RESIDUAL, ParallelConfig(), 1),
    "tensor, residual": (RESIDUAL, ParallelConfig(tensor=2, sequence=True), 2),
    "tensor without sequence, ZeRO 0": (MODEL, ParallelConfig(tensor=2, zero=0), 2),
    "experts over data": (MODEL, ParallelConfig(data=2, expert=2, zero=2), 2),
    "experts over tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2), 2),
    "data without experts": (MODEL, ParallelConfig(data=2), 2),
    "tied over stages": (TIED, ParallelConfig(pipeline=2), 2),
    "interleaved stages": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2), 2),
    "context": (MODEL, ParallelConfig(context=2), 2),
    "tensor, stages and experts": (RESIDUAL, ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2), 4),
}


def parts_and_state(ranks: Ranks, model: ModelConfig, parallel: ParallelConfig) -> tuple[list[tuple], list]:
    """All that this rank holds, block by block, and what it would save."""
    run = make_run(model, parallel)
    engine = build_engine(run, start(run), find_platform())
    held = [
        (part.name, part.start, item.parameter.data.flatten()[part.offset : part.offset + part.size].view(part.shape))
        for item in engine._parameters
        for part in item.parts
    ]
    return held, copies(engine.state_fragments())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_is_held_and_starts_with_the_references_value(name: str) -> None:
    model, parallel, world_size = LAYOUTS[name]
    results = run_ranks(parts_and_state, world_size, model=model, parallel=parallel)
    seed = make_run(model, parallel).train.seed
    expected = {name: initial_value(name, model, seed) for name in parameter_shapes(model)}
    missing = {name: torch.ones_like(value, dtype=torch.bool) for name, value in expected.items()}
    for held, _ in results:
        for part_name, start_at, block in held:
            place = tuple(slice(low, low + size) for low, size in zip(start_at, block.shape, strict=True))
            assert torch.equal(block, expected[part_name][place]), part_name
            missing[part_name][place] = False
    assert not any(bool(elements.any()) for elements in missing.values())
    # The state leaves replicas and the tied copy out: `whole` fails if an element comes twice.
    saved = whole(state for _, state in results)
    weights = of_kind("weight", saved)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = of_kind(moment, saved)
        assert {name: value.shape for name, value in moments.items()} == {n: v.shape for n, v in expected.items()}
        assert not any(bool(value.any()) for value in moments.values())
    loads = of_kind("router_load", saved)
    assert loads.keys() == {str(layer) for layer in range(model.num_layers)}
    assert all(torch.equal(load, torch.full((4,), 0.25, dtype=torch.float64)) for load in loads.values())


def test_the_tied_embedding_lives_at_both_ends_of_the_pipeline() -> None:
    model, parallel, world_size = LAYOUTS["tied over stages"]
    results = run_ranks(parts_and_state, world_size, model=model, parallel=parallel)
    for held, _ in results:
        assert [part_name for part_name, *_ in held].count(EMBEDDING) == 1


def bf16_weights(ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights that compute, and the master weights that are kept, by name."""
    run = make_run(RESIDUAL, precision="bf16")
    engine = build_engine(run, start(run), find_platform())
    masters = of_kind("weight", whole([copies(engine.state_fragments())]))
    computing: dict[str, Tensor] = {name: torch.empty(value.shape) for name, value in masters.items()}
    for item in engine._parameters:
        assert item.parameter.dtype == torch.bfloat16
        for part in item.parts:
            block = item.parameter.data.flatten()[part.offset : part.offset + part.size].view(part.shape)
            place = tuple(slice(low, low + size) for low, size in zip(part.start, part.shape, strict=True))
            computing[part.name][place] = block.float()
    return {name: (computing[name], masters[name]) for name in masters}


def test_a_bf16_model_starts_from_the_same_values_rounded() -> None:
    run = make_run(RESIDUAL, precision="bf16")
    for name, (computing, master) in run_ranks(bf16_weights, 1)[0].items():
        rounded = initial_value(name, RESIDUAL, run.train.seed, dtype=torch.bfloat16).float()
        assert torch.equal(computing, rounded), name
        assert master.dtype == torch.float32 and torch.equal(master, rounded), name
