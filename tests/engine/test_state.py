"""Resume law: stop anywhere and go on, with the same bits on the same layout, within the layout law on another."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tolerance
import torch
from layouts import MODEL, RESIDUAL, TIED, batch_of, copies, in_tiers, make_run, of_kind, start, take_step, whole
from ranks import run_ranks

from megagrok.checkpoint import Fragment, find_checkpoint, save_checkpoint
from megagrok.config.schema import ModelConfig, ParallelConfig, RunConfig
from megagrok.engine.engine import Engine, build_engine
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

DEEP = replace(RESIDUAL, num_layers=4)
SAVED_AT, STEPS = 3, 6
SPREAD = ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2)
OTHERS = {
    "one rank": ParallelConfig(),
    "one rank, ZeRO 0": ParallelConfig(zero=0),
    "experts over data": ParallelConfig(data=2, expert=2),
    "data, ZeRO 2": ParallelConfig(data=2, zero=2),
    "interleaved stages": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "context, ZeRO 0": ParallelConfig(context=2, zero=0),
}


@dataclass(frozen=True, slots=True)
class Ran:
    """Losses of steps, as all ranks saw them, and this rank's part of the state at the end."""

    losses: list[float]
    state: list[Fragment]


def steps_of(engine: Engine, run: RunConfig, groups: object, first: int, end: int) -> list[float]:
    return [take_step(engine, batch_of(run, number, groups)).loss for number in range(first, end)]


def save(engine: Engine, folder: Path, step: int, ranks: Ranks) -> None:
    save_checkpoint(folder, step, engine.state_fragments(), {"run_id": "law"}, ranks=ranks, keep=2)


def load(engine: Engine, folder: Path, ranks: Ranks) -> int:
    checkpoint = find_checkpoint(folder, ranks=ranks)
    assert checkpoint is not None
    engine.load(checkpoint)
    return checkpoint.step


def run_through(ranks: Ranks, run: RunConfig, folder: Path) -> Ran:
    """All steps in one go, saved on the way."""
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    losses = steps_of(engine, run, groups, 0, SAVED_AT)
    save(engine, folder, SAVED_AT, ranks)
    losses += steps_of(engine, run, groups, SAVED_AT, STEPS)
    return Ran(losses, copies(engine.state_fragments()))


def go_on(ranks: Ranks, runs: list[RunConfig], folder: Path) -> list[Ran]:
    """The steps after the checkpoint, in an engine that begins with it; runs differ in what one world can hold."""
    groups = start(runs[0])
    results = []
    for run in runs:
        engine = build_engine(run, groups, find_platform())
        assert load(engine, folder, ranks) == SAVED_AT
        losses = steps_of(engine, run, groups, SAVED_AT, STEPS)
        results.append(Ran(losses, copies(engine.state_fragments())))
    return results


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ran]]:
    """A run on TP 2 with SP, PP 2, EP 2, ZeRO 1, and the checkpoint that it left."""
    folder = tmp_path_factory.mktemp("spread")
    return folder, run_ranks(run_through, 4, run=make_run(DEEP, SPREAD), folder=folder)


@pytest.mark.parametrize("name", in_tiers(OTHERS, slow=("one rank, ZeRO 0", "data, ZeRO 2", "context, ZeRO 0")))
def test_another_layout_goes_on_within_the_layout_law(name: str, spread: tuple[Path, list[Ran]]) -> None:
    folder, through = spread
    run = make_run(DEEP, OTHERS[name])
    results = [result for (result,) in run_ranks(go_on, world_size(run.parallel), runs=[run], folder=folder)]
    for result in results:
        for loss, expected in zip(result.losses, through[0].losses[SAVED_AT:], strict=True):
            assert abs(loss - expected) < tolerance.LAYOUT_LOSS
    weights, expected_weights = (of_kind("weight", whole(result.state for result in ran)) for ran in (results, through))
    assert weights.keys() == expected_weights.keys()
    for parameter, weight in weights.items():
        assert float((weight - expected_weights[parameter]).abs().max()) < tolerance.LAYOUT_WEIGHTS, parameter


SAME = {
    "one rank": (RESIDUAL, ParallelConfig(), "fp32"),
    "ZeRO 0": (MODEL, ParallelConfig(data=2, zero=0), "fp32"),
    "ZeRO 2, experts": (MODEL, ParallelConfig(data=2, expert=2, zero=2), "fp32"),
    "tensor and experts": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2), "fp32"),
    "tied stages": (TIED, ParallelConfig(pipeline=2), "fp32"),
    "interleaved": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2), "fp32"),
    "bf16, experts": (MODEL, ParallelConfig(data=2, expert=2), "bf16"),
    "bf16, tied stages": (TIED, ParallelConfig(pipeline=2), "bf16"),
}


def stop_and_go_on(ranks: Ranks, run: RunConfig, folder: Path) -> tuple[Ran, Ran]:
    """Ten steps in one go, and five, a checkpoint, a new engine, and five more."""
    groups = start(run)
    through = build_engine(run, groups, find_platform())
    losses = steps_of(through, run, groups, 0, 10)
    first = build_engine(run, groups, find_platform())
    resumed_losses = steps_of(first, run, groups, 0, 5)
    save(first, folder, 5, ranks)
    second = build_engine(run, groups, find_platform())
    # Steps before the load, so that nothing of a new engine's own state can pass for the checkpoint's.
    steps_of(second, run, groups, 20, 22)
    assert load(second, folder, ranks) == 5
    resumed_losses += steps_of(second, run, groups, 5, 10)
    return (
        Ran(losses, copies(through.state_fragments())),
        Ran(resumed_losses, copies(second.state_fragments())),
    )


@pytest.mark.parametrize(
    "name", in_tiers(SAME, slow=("one rank", "ZeRO 0", "tensor and experts", "interleaved", "bf16, tied stages"))
)
def test_ten_steps_are_five_a_checkpoint_and_five_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, parallel, precision = SAME[name]
    run = make_run(model, parallel, precision=precision)
    for through, resumed in run_ranks(stop_and_go_on, world_size(parallel), run=run, folder=tmp_path):
        assert resumed.losses == through.losses
        for fragment, expected in zip(resumed.state, through.state, strict=True):
            assert fragment.name == expected.name and torch.equal(fragment.data, expected.data), fragment.name


def load_into(ranks: Ranks, model: ModelConfig, folder: Path) -> None:
    run = make_run(model)
    load(build_engine(run, start(run), find_platform()), folder, ranks)


WIDER_EXPERTS = replace(DEEP, moe=replace(DEEP.moe, ffn_hidden=64))
OTHER_MODELS = {
    "wider": (replace(DEEP, hidden=64), r"exp_avg/lm_head.weight: shape \(128, 32\) there, shape \(128, 64\) in"),
    "wider experts": (WIDER_EXPERTS, r"experts.0.w1.weight: shape \(48, 32\) there, shape \(64, 32\) in"),
    "deeper": (replace(DEEP, num_layers=6), r"exp_avg/model.layers.4.*: no such tensor there"),
    "shallower": (replace(DEEP, num_layers=2), r"exp_avg/model.layers.2.*no such tensor in the configuration"),
    "tied": (replace(DEEP, tied_embeddings=True), r"exp_avg/lm_head.weight: .*no such tensor in the configuration"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_refused(name: str, spread: tuple[Path, list[Ran]]) -> None:
    """A shallower model too, which would find every tensor that it asks for."""
    folder, _ = spread
    model, difference = OTHER_MODELS[name]
    with pytest.raises(CheckpointError, match="is of another model") as refused:
        run_ranks(load_into, 1, model=model, folder=folder)
    assert re.search(difference, str(refused.value))
