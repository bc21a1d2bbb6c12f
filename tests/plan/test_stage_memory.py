"""Bytes at the peak of a step: what more of anything costs, and what recomputation, stages and even routing spare."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megagrok.config import load_config
from megagrok.config.schema import Recompute
from megagrok.plan.imbalance import skew
from megagrok.plan.in_flight import chunks_in_flight
from megagrok.plan.memory import pipeline_layers, state_bytes
from megagrok.plan.shape import MEGAGROK, Layout, Shape
from megagrok.plan.stage_memory import stage_memory

RUN = load_config(Path(__file__).parents[2] / "configs/run/pretrain-286b.yaml").config
SHAPE, LAYOUT = Shape.of(RUN.model), Layout.of(RUN)


def peak(layout: Layout) -> int:
    return max(stage.total for stage in stage_memory(SHAPE, layout, MEGAGROK))


def test_state_is_that_of_describe_and_check() -> None:
    states = state_bytes(RUN.model, RUN.parallel, RUN.train.precision)
    for stage, state in zip(stage_memory(SHAPE, LAYOUT, MEGAGROK), states, strict=True):
        assert (stage.weights, stage.gradients, stage.optimizer) == (state.weights, state.gradients, state.optimizer)


def test_the_parts_add_up() -> None:
    for stage in stage_memory(SHAPE, LAYOUT, MEGAGROK):
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.transient, stage.logits)
        assert stage.total == sum(parts) + stage.imbalance + stage.communication + stage.reserve
        assert stage.allocated == stage.total - stage.reserve
        assert min(parts) >= 0


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_larger_micro_batch_a_longer_sequence_and_more_in_flight_never_hold_less(recompute: Recompute) -> None:
    layout = replace(LAYOUT, recompute=recompute)
    for more in (
        replace(layout, micro_batch=2, num_micro_batches=layout.num_micro_batches // 2),
        replace(layout, seq_len=2 * layout.seq_len),
    ):
        assert peak(more) > peak(layout)
    assert peak(replace(layout, num_micro_batches=4)) < peak(layout)


def test_recomputing_more_holds_less() -> None:
    none, selective, full = (peak(replace(LAYOUT, recompute=kind)) for kind in ("none", "selective", "full"))
    assert none > selective > full


def test_earlier_stages_hold_more_micro_batches() -> None:
    kept = [stage.activations for stage in stage_memory(SHAPE, LAYOUT, MEGAGROK)]
    # The last keeps what the head needs besides.
    assert all(earlier > later for earlier, later in pairwise(kept[:-1]))
    assert kept[-1] < kept[0]


def test_one_forward_one_backward_runs_ahead_by_the_stages_behind() -> None:
    assert [chunks_in_flight(4, 1, 100, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(4, 1, 2, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_interleaving_runs_ahead_by_the_warm_up_of_its_schedule() -> None:
    # Warm-up of Megatron's interleaved schedule, 2 (p - i - 1) + (v - 1) p, and the forward before the first backward.
    assert [chunks_in_flight(4, 2, 100, stage) for stage in range(4)] == [11, 9, 7, 5]
    assert chunks_in_flight(4, 2, 4, 0) == 8


def test_even_routing_needs_no_headroom_and_skew_grows_with_the_ranks_that_share_the_experts() -> None:
    even = stage_memory(SHAPE, LAYOUT, replace(MEGAGROK, routing="balanced"))
    natural = stage_memory(SHAPE, LAYOUT, MEGAGROK)
    assert all(stage.imbalance == 0 for stage in even)
    assert all(stage.imbalance > 0 for stage in natural)
    assert skew(8, 2, 1, 1e4).p99 == 0
    spread = [skew(8, 2, ranks, 1e4) for ranks in (2, 4, 8)]
    assert all(0 < one.p50 < one.p99 for one in spread)
    assert [one.p99 for one in spread] == sorted(one.p99 for one in spread)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 2, 8), (8, 8, 4), (64, 6, 64), (8, 2, 2)])
def test_no_rank_gets_more_than_every_token(experts: int, top_k: int, ranks: int) -> None:
    assert skew(experts, top_k, ranks, 10.0).p99 <= min(ranks, experts / top_k) - 1


@pytest.mark.parametrize("evens_stages", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2, 3, 5, 8, 64])
def test_every_layer_is_on_one_stage(pipeline: int, evens_stages: bool) -> None:
    layers = pipeline_layers(SHAPE, pipeline, evens_stages)
    assert len(layers) == pipeline
    assert sum(stage.dense + stage.expert for stage in layers) == SHAPE.layers
    assert all(stage.dense >= 0 and stage.expert >= 0 for stage in layers)


def test_fifty_thousand_layouts_take_seconds() -> None:
    layouts = [replace(LAYOUT, num_micro_batches=count) for count in range(8, 508)]
    started = time.process_time()
    for layout in layouts:
        stage_memory(SHAPE, layout, MEGAGROK)
    assert (time.process_time() - started) / len(layouts) * 50_000 < 10
