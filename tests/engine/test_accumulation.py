"""How samples are cut into micro-batches is invisible, also when labels are missing and micro-batches are ragged."""

from dataclasses import replace

import pytest
import tolerance
import torch
from layouts import (
    MODEL,
    Oracle,
    Step,
    assert_close,
    batch_of,
    in_tiers,
    make_run,
    of_kind,
    start,
    take_step,
    tokens_of,
    whole,
)
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import ParallelConfig, RunConfig
from megagrok.engine.engine import build_engine
from megagrok.errors import DataError
from megagrok.model.loss import IGNORED_LABEL
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

SAMPLES = 8
DEEP = replace(MODEL, num_layers=4)
LAYOUTS = {
    "one rank": (MODEL, ParallelConfig()),
    "data, ZeRO 2": (MODEL, ParallelConfig(data=2, zero=2)),
    "data, ZeRO 0": (MODEL, ParallelConfig(data=2, zero=0)),
    "experts": (MODEL, ParallelConfig(data=2, expert=2)),
    "tensor": (MODEL, ParallelConfig(tensor=2, sequence=True)),
    "stages": (MODEL, ParallelConfig(pipeline=2)),
    "interleaved": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "context": (MODEL, ParallelConfig(context=2)),
}


def ragged_labels(run: RunConfig) -> Tensor:
    """Labels of which a sample counts all, another none, another only its last."""
    _, labels_BS = tokens_of(run, step=0)
    labels_BS[1] = IGNORED_LABEL
    labels_BS[2, :-1] = IGNORED_LABEL
    labels_BS[5, ::3] = IGNORED_LABEL
    return labels_BS


def first_steps(ranks: Ranks, runs: list[RunConfig], labels: Tensor | None) -> list[Step]:
    """The first step of an engine of each run; the runs differ in micro-batches alone."""
    groups = start(runs[0])
    return [take_step(build_engine(run, groups, find_platform()), batch_of(run, 0, groups, labels)) for run in runs]


def check_against_oracle(runs: list[RunConfig], labels: Tensor | None) -> None:
    by_rank = run_ranks(first_steps, world_size(runs[0].parallel), runs=runs, labels=labels)
    for number, run in enumerate(runs):
        expected = Oracle(run).take_step(batch_of(run, 0, labels=labels))
        steps = [steps[number] for steps in by_rank]
        for step in steps:
            assert step.totals.num_tokens == expected.totals.num_tokens
            assert abs(step.loss - expected.loss) < tolerance.LAYOUT_LOSS
            assert step.update.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance.LAYOUT_GRAD_NORM)
            assert torch.equal(step.totals.tokens_per_expert_LE, expected.totals.tokens_per_expert_LE)
        gradients = of_kind("gradient", whole(step.gradients for step in steps))
        assert_close(gradients, expected.gradients, tolerance.LAYOUT_GRADIENT)


@pytest.mark.parametrize("name", ["one rank", "experts", "stages"])
def test_any_number_of_micro_batches_gives_the_same_step(name: str) -> None:
    model, parallel = LAYOUTS[name]
    widths = [width for width in (1, 2, 4, 8) if SAMPLES // (width * parallel.data) >= parallel.pipeline]
    check_against_oracle(
        [
            make_run(model, parallel, global_batch=SAMPLES, evaluate_samples=SAMPLES, micro_batch=width)
            for width in widths
        ],
        None,
    )


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("one rank", "data, ZeRO 0", "context")))
def test_labels_that_do_not_count_are_invisible_on_any_layout(name: str) -> None:
    model, parallel = LAYOUTS[name]
    runs = [
        make_run(model, parallel, global_batch=SAMPLES, evaluate_samples=SAMPLES, micro_batch=width) for width in (1, 2)
    ]
    check_against_oracle(runs, ragged_labels(runs[0]))


def step_without_labels(ranks: Ranks) -> None:
    run = make_run(parallel=ParallelConfig(data=2))
    groups = start(run)
    labels = torch.full_like(tokens_of(run, 0)[1], IGNORED_LABEL)
    build_engine(run, groups, find_platform()).forward_backward(batch_of(run, 0, groups, labels))


def test_a_step_without_any_label_is_refused() -> None:
    with pytest.raises(DataError, match="no label that counts"):
        run_ranks(step_without_labels, 2)
