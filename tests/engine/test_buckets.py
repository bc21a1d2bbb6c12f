"""Gradients are reduced in buckets. A full-size model has parameters larger than one; here buckets are made small."""

import pytest
import tolerance
from layouts import (
    MODEL,
    TIED,
    Oracle,
    Step,
    assert_close,
    batch_of,
    in_tiers,
    make_run,
    of_kind,
    start,
    take_step,
    whole,
)
from ranks import run_ranks

from megagrok.config.schema import ParallelConfig
from megagrok.engine import optimizer
from megagrok.engine.engine import build_engine
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

# The model's parameters have 32 to 12288 elements: smaller than all but norms, between, and so large that all fit.
BUCKETS = (100, 3000, 1 << 20)
LAYOUTS = {
    "experts": (MODEL, ParallelConfig(data=2, expert=2)),
    "data": (MODEL, ParallelConfig(data=2)),
    "experts, ZeRO 2": (MODEL, ParallelConfig(data=2, expert=2, zero=2)),
    "experts over tensor": (MODEL, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "tied stages": (TIED, ParallelConfig(pipeline=2)),
}


def steps_with_buckets(ranks: Ranks, name: str) -> list[list[Step]]:
    """Two steps for each size of bucket."""
    model, parallel = LAYOUTS[name]
    run = make_run(model, parallel)
    groups = start(run)
    results = []
    for elements in BUCKETS:
        vars(optimizer)["_BUCKET_ELEMENTS"] = elements
        engine = build_engine(run, groups, find_platform())
        assert int(engine._optimizer.reduce_bucket_size) <= elements
        results.append([take_step(engine, batch_of(run, number, groups)) for number in range(2)])
    return results


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("data", "experts over tensor", "tied stages")))
def test_the_size_of_a_bucket_is_invisible(name: str) -> None:
    model, parallel = LAYOUTS[name]
    run = make_run(model, parallel)
    by_rank = run_ranks(steps_with_buckets, world_size(parallel), name=name)
    for size in range(len(BUCKETS)):
        oracle = Oracle(run)
        for number in range(2):
            expected = oracle.take_step(batch_of(run, number))
            gradients = of_kind("gradient", whole(steps[size][number].gradients for steps in by_rank))
            assert_close(gradients, expected.gradients, tolerance.LAYOUT_GRADIENT * (1 + 4 * number))
            for steps in by_rank:
                norm = steps[size][number].update.grad_norm
                assert norm == pytest.approx(expected.grad_norm, rel=2 * tolerance.LAYOUT_GRAD_NORM)
