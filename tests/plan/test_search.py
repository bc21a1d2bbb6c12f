"""The search takes the fastest of all that fit, says the same twice, and passes over nothing that would have fitted."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megagrok.config import load_config
from megagrok.plan import check, world_size
from megagrok.plan.estimate import Machine, StepSeconds, estimate
from megagrok.plan.gpus import GIB, find_gpu
from megagrok.plan.search import fewest_that_fit, fits, nearest_worlds, search
from megagrok.plan.shape import MEGAGROK, Layout, Shape
from megagrok.plan.space import RECOMPUTES, families
from megagrok.plan.stage_memory import stage_memory

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = load_config(CONFIGS / "run" / "quickstart.yaml").config
PRETRAIN = load_config(CONFIGS / "run" / "pretrain-286b.yaml").config
LARGE = load_config(
    CONFIGS / "run" / "pretrain-286b.yaml", ("model.num_layers=8", "parallel.virtual_pipeline=1")
).config
H100 = find_gpu("h100")
NODE = Machine(H100, 8, H100.network_bandwidth)


def of_memory(memory_bytes: int) -> Machine:
    return replace(NODE, gpu=replace(H100, memory_bytes=memory_bytes))


def every_layout(world: int) -> list[Layout]:
    return [
        replace(Layout.of(run), recompute=recompute)
        for family in families(QUICK, world, ["bf16"])
        for run in family
        for recompute in RECOMPUTES
    ]


def peaks(world: int) -> list[int]:
    shape = Shape.of(QUICK.model)
    return sorted(estimate(shape, layout, NODE).peak_bytes for layout in every_layout(world))


def test_the_best_are_the_fastest_of_all_that_fit() -> None:
    shape, sizes = Shape.of(QUICK.model), peaks(4)
    machine = of_memory(sizes[len(sizes) // 2])
    found = search(QUICK, 4, machine, ["bf16"], top=7)
    prices = [estimate(shape, layout, machine) for layout in every_layout(4)]
    fitting = sorted(price.seconds.total for price in prices if price.peak_bytes <= machine.gpu.memory_bytes)
    assert found.legal == len(prices)
    assert found.fitting == len(fitting)
    assert found.legal == found.fitting + found.too_large + found.larger_still
    assert 0 < found.fitting < found.legal
    assert [candidate.estimate.seconds.total for candidate in found.best] == pytest.approx(fitting[:7])


def test_the_same_question_has_the_same_answer() -> None:
    assert search(QUICK, 4, NODE, ["bf16"], top=5) == search(QUICK, 4, NODE, ["bf16"], top=5)


def test_every_layout_that_is_proposed_passes_check_as_the_run_that_is_written_down() -> None:
    found = search(LARGE, 16, of_memory(200 * GIB), ["bf16"], top=10)
    assert len(found.best) == 10
    for candidate in found.best:
        assert not check(candidate.run, 16)
        assert Layout.of(candidate.run) == candidate.estimate.layout
        assert world_size(candidate.run.parallel) == 16
        assert candidate.run.train.global_batch == LARGE.train.global_batch


def test_a_larger_micro_batch_never_holds_less() -> None:
    # What lets the search pass over those above one that does not fit.
    shape = Shape.of(PRETRAIN.model)
    for family in list(families(PRETRAIN, 64, ["bf16"]))[::31]:
        for recompute in RECOMPUTES:
            layouts = [replace(Layout.of(run), recompute=recompute) for run in family]
            sizes = [max(stage.total for stage in stage_memory(shape, layout, MEGAGROK)) for layout in layouts]
            assert sizes == sorted(sizes), layouts[0]


def test_where_nothing_fits_the_smallest_is_named_and_nothing_proposed() -> None:
    sizes = peaks(4)
    found = search(QUICK, 4, of_memory(sizes[0] - 1), ["bf16"], top=5)
    assert not found.best and not found.fitting
    assert found.nearest is not None and found.nearest.estimate.peak_bytes == sizes[0]
    assert fits(QUICK, 4, of_memory(sizes[0]), ["bf16"]) and not fits(QUICK, 4, of_memory(sizes[0] - 1), ["bf16"])


def test_the_number_of_gpus_that_is_advised_holds_the_run_and_half_of_it_does_not() -> None:
    advised = fewest_that_fit(LARGE, 2, NODE, ["bf16"])
    assert advised is not None and advised > 4
    assert fits(LARGE, advised, NODE, ["bf16"]) and not fits(LARGE, advised // 2, NODE, ["bf16"])


def test_the_numbers_of_gpus_beside_an_impossible_one_have_layouts() -> None:
    assert next(families(PRETRAIN, 7 * 8, ["bf16"]), None) is None
    assert nearest_worlds(PRETRAIN, 7 * 8, 8, ["bf16"]) == [32, 64]
    for world in (32, 64):
        assert next(families(PRETRAIN, world, ["bf16"]), None) is not None


def upside_down(seconds: StepSeconds) -> StepSeconds:
    """The slower, the faster."""
    return StepSeconds(1 / seconds.total, *[0.0] * (len(fields(StepSeconds)) - 1))


def test_the_order_is_that_of_the_corrected_times() -> None:
    shape = Shape.of(QUICK.model)
    slowest = max(estimate(shape, layout, NODE).seconds.total for layout in every_layout(4))
    won = search(QUICK, 4, NODE, ["bf16"], top=1, correct=upside_down).best[0].estimate
    assert won.seconds.total == pytest.approx(1 / slowest)
    assert won.tokens_per_second == pytest.approx(won.layout.tokens / won.seconds.total)
