"""With dropout, too, a layout is invisible: masks belong to samples, so the oracle and every layout drop the same."""

from dataclasses import replace

import pytest
import tolerance
from layouts import (
    MODEL,
    RESIDUAL,
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

from megagrok.config.schema import ModelConfig, ParallelConfig, RunConfig
from megagrok.engine.engine import build_engine
from megagrok.errors import DataError
from megagrok.model.dropout import stream_of
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

RATE = 0.2
STEPS = (1, 2)
DEEP = replace(RESIDUAL, num_layers=4)
LAYOUTS: dict[str, tuple[ModelConfig, ParallelConfig, dict[str, object]]] = {
    "one rank, two samples at once": (RESIDUAL, ParallelConfig(), {"micro_batch": 2}),
    "tensor and sequence": (RESIDUAL, ParallelConfig(tensor=2, sequence=True), {"micro_batch": 2}),
    "tensor": (MODEL, ParallelConfig(tensor=2), {}),
    "stages, recomputed": (TIED, ParallelConfig(pipeline=2), {"recompute": "full"}),
    "interleaved": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2), {}),
    "interleaved, recomputed": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2), {"recompute": "full"}),
    "experts": (MODEL, ParallelConfig(data=2, expert=2), {}),
    "replicas, ZeRO 2": (MODEL, ParallelConfig(data=2, zero=2), {"micro_batch": 2}),
    "context": (RESIDUAL, ParallelConfig(context=2), {}),
    "tensor, context, stages": (
        DEEP,
        ParallelConfig(tensor=2, sequence=True, context=2, pipeline=2),
        {"recompute": "full"},
    ),
    "one rank, attention recomputed": (MODEL, ParallelConfig(), {"recompute": "selective"}),
}
SLOW = ("tensor", "replicas, ZeRO 2", "tensor, context, stages")


def run_of(name: str) -> RunConfig:
    model, parallel, train = LAYOUTS[name]
    return make_run(replace(model, dropout=RATE), parallel, **train)


def two_steps(ranks: Ranks, name: str) -> tuple[list[Step], tuple[float, int], tuple[float, int]]:
    """Two steps, and the held-out loss after them, of a model with dropout and of one with its weights and without."""
    run = run_of(name)
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    steps = [take_step(engine, batch_of(run, number, groups)) for number in STEPS]
    evaluated = engine.evaluate(batch_of(run, 9, groups))
    for chunk in engine._chunks:
        for layer in chunk.decoder.layers:
            layer.self_attn_bda.rate = layer.mlp_bda.rate = 0.0
    return steps, evaluated, engine.evaluate(batch_of(run, 9, groups))


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=SLOW))
def test_every_layout_drops_what_the_oracle_drops(name: str) -> None:
    run = run_of(name)
    oracle = Oracle(run)
    by_rank = run_ranks(two_steps, world_size(run.parallel), name=name)
    first, second = (oracle.take_step(batch_of(run, number)) for number in STEPS)
    for steps, evaluated, without in by_rank:
        assert abs(steps[0].loss - first.loss) < tolerance.LAYOUT_LOSS
        assert abs(steps[0].update.grad_norm / first.grad_norm - 1) < tolerance.LAYOUT_GRAD_NORM
        # Its weights are the layout's own by now, so only the loss can be held to the oracle's.
        assert abs(steps[1].loss - second.loss) < tolerance.LAYOUT_LOSS
        assert evaluated == without
    gradients = of_kind("gradient", whole(steps[0].gradients for steps, *_ in by_rank))
    assert_close(gradients, first.gradients, tolerance.LAYOUT_GRADIENT)


def streams_of(ranks: Ranks, name: str) -> list[tuple[int, int, int]]:
    """(layer, branch, stream) of every residual of this rank."""
    groups = start(run_of(name))
    layers = [
        layer for chunk in build_engine(run_of(name), groups, find_platform())._chunks for layer in chunk.decoder.layers
    ]
    return [
        (layer.layer_number - 1, branch, residual._stream)
        for layer in layers
        for branch, residual in enumerate((layer.self_attn_bda, layer.mlp_bda))
    ]


def test_every_branch_of_every_layer_of_the_whole_model_has_a_stream_of_its_own() -> None:
    run = run_of("interleaved")
    found = sorted(item for rank in run_ranks(streams_of, 2, name="interleaved") for item in rank)
    places = [(layer, branch) for layer in range(run.model.num_layers) for branch in range(2)]
    assert found == [(*place, stream_of(run.train.seed, *place)) for place in places]


def without_ids(ranks: Ranks) -> None:
    run = make_run(replace(MODEL, dropout=RATE))
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    batch = batch_of(run, 0, groups)
    with pytest.raises(DataError, match="3 sample ids for 4 micro-batches of 1: dropout needs one for each sample"):
        engine.forward_backward(replace(batch, sample_ids=batch.sample_ids[1:]))
    # Evaluation drops nothing and asks for none.
    engine.evaluate(replace(batch, sample_ids=()))


def test_a_batch_without_ids_is_refused_rather_than_trained_without_dropout() -> None:
    run_ranks(without_ids, 1)


def asked_about(ranks: Ranks) -> list[list[int]]:
    """For each call of the first layer's attention branch, in order, the tokens it was asked about."""
    run = make_run(replace(MODEL, dropout=RATE), recompute="full", micro_batch=1)
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    residual = engine._chunks[0].decoder.layers[0].self_attn_bda
    asked: list[list[int]] = []
    residual.register_forward_hook(lambda *_: asked.append(residual._numbers_sb.flatten().tolist()))
    engine.forward_backward(batch_of(run, 3, groups))
    return asked


def test_recomputation_asks_about_the_tokens_of_the_first_time() -> None:
    (asked,) = run_ranks(asked_about, 1)
    expected = [[sample * MODEL.max_positions + position for position in range(16)] for sample in (12, 13, 14, 15)]
    assert asked == [numbers for numbers in expected for _ in range(2)]
