"""Bytes of weights, gradients and optimizer state on the fullest rank of each pipeline stage.

Not activations: those need the schedule (`stage_memory.py`, which counts state with the functions of this file). Who
holds what: attention, dense MLPs, embedding and head are split over the tensor ranks; router and norms are whole on
each; experts are shared out over the expert ranks, and whole unless a trainer splits them too. ZeRO shards dense state
over the context * data ranks that hold the same dense weights, and expert state over the tensor * context * data /
(expert * expert_tensor) ranks that hold the same experts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from megagrok.config.schema import ModelConfig, ParallelConfig, Precision
from megagrok.plan.shape import MEGAGROK, Habits, Layout, Shape

MOMENT_BYTES = 8
"""AdamW's two moments, fp32."""
MASTER_BYTES = 4
"""fp32 copy of the weights: of bf16 weights always, and of fp32 ones in DeepSpeed's sharded optimizer (ZeRO 1, 2)."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes on one rank that stay through the step."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class RankParams:
    """Parameters that one rank of a stage holds, by the group that ZeRO shards them over."""

    dense: int
    expert: int


@dataclass(frozen=True, slots=True)
class StageLayers:
    """Layers of one stage: with a dense MLP, and with experts."""

    dense: int
    expert: int


def state_bytes(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> tuple[StateBytes, ...]:
    """For each pipeline stage, first to last, the bytes on the fullest of its ranks.

    The layout has to be one that `megagrok.plan.check` accepts.
    """
    layout = Layout.of_state(parallel, precision)
    return tuple(state_of(stage_params(model, parallel, stage), layout, MEGAGROK) for stage in range(parallel.pipeline))


def stage_params(model: ModelConfig, parallel: ParallelConfig, stage: int) -> RankParams:
    """Parameters on each rank of pipeline stage `stage`. A tied embedding is also on the last stage, as the head."""
    return held_params(Shape.of(model), parallel.tensor, parallel.pipeline, parallel.expert, 1, stage)


def held_params(shape: Shape, tensor: int, pipeline: int, expert: int, expert_tensor: int, stage: int) -> RankParams:
    """Parameters on each rank of a stage, for any shape, of a trainer that places layers evenly."""
    return params_of_layers(shape, tensor, pipeline, expert, expert_tensor, stage_layers(shape, pipeline, stage), stage)


def params_of_layers(
    shape: Shape, tensor: int, pipeline: int, expert: int, expert_tensor: int, layers: StageLayers, stage: int
) -> RankParams:
    """Parameters on each rank of a stage that has these layers, for any shape."""
    mlp = shape.ffn_matrices * shape.hidden
    # Four norms, as Grok has them; other models have two, a difference of one part in ten thousand.
    every_layer = shape.attention_params // tensor + 4 * shape.hidden
    dense = (layers.dense + layers.expert) * every_layer + layers.dense * (mlp * shape.dense_ffn // tensor)
    dense += layers.expert * (mlp * shape.shared_ffn // tensor + shape.hidden * shape.experts)
    table = shape.vocab * shape.hidden // tensor
    is_first, is_last = stage == 0, stage == pipeline - 1
    if is_first:
        dense += table
    if is_last:
        dense += shape.hidden
    if is_last and not (is_first and shape.tied):
        dense += table
    own_experts = shape.experts // expert
    return RankParams(dense, layers.expert * own_experts * mlp * shape.expert_ffn // expert_tensor)


@lru_cache(maxsize=4096)
def pipeline_layers(shape: Shape, pipeline: int, evens_stages: bool) -> tuple[StageLayers, ...]:
    """Layers of each stage. Dense ones come first in a model. Where layers do not divide, early stages have one more.

    evens_stages: layers are placed as if embedding and head were layers too, each worth its parameters, until a stage
    has its share (nanotron, pipeline_parallel/block.py and trainer.py); the head then costs its stage some layers.
    """
    if evens_stages and pipeline > 1:
        params = total_shape_params(shape)
        head = shape.vocab * shape.hidden
        share = (params - head) / pipeline
        layer = (params - 2 * head) / shape.layers
        ends = [min(shape.layers, math.ceil(share * stage / layer)) for stage in range(1, pipeline)]
    else:
        each, more = divmod(shape.layers, pipeline)
        ends = [each * stage + min(stage, more) for stage in range(1, pipeline)]
    num_dense = shape.dense_layers if shape.experts else shape.layers
    layers = []
    for first, end in zip([0, *ends], [*ends, shape.layers], strict=True):
        dense = min(max(num_dense - first, 0), end - first)
        layers.append(StageLayers(dense, end - first - dense))
    return tuple(layers)


def stage_layers(shape: Shape, pipeline: int, stage: int) -> StageLayers:
    """Layers of one stage of a trainer that places them evenly."""
    return pipeline_layers(shape, pipeline, False)[stage]


def total_shape_params(shape: Shape) -> int:
    """All parameters of a shape, its embedding and its head counted separately."""
    (layers,) = pipeline_layers(shape, 1, False)
    params = params_of_layers(shape, 1, 1, 1, 1, layers, 0)
    return params.dense + params.expert + (shape.vocab * shape.hidden if shape.tied else 0)


def state_of(params: RankParams, layout: Layout, habits: Habits) -> StateBytes:
    """Bytes of these parameters' weights, gradients and optimizer state on one rank."""
    num_params = params.dense + params.expert
    dense_copies = layout.context * layout.data
    expert_copies = max(1, layout.tensor * dense_copies // (layout.expert * layout.expert_tensor))
    sharded = -(-params.dense // dense_copies) + -(-params.expert // expert_copies)
    has_master = layout.precision != "fp32" or layout.zero > 0
    # Whole at ZeRO 1, and at megagrok's ZeRO 2: its schedule accumulates all micro-batches before it keeps its shard.
    held = sharded if layout.zero == 3 else num_params
    return StateBytes(
        held * weight_bytes(layout.precision),
        held * habits.gradient_bytes,
        (sharded if layout.zero else num_params) * (habits.moment_bytes + MASTER_BYTES * has_master),
    )


def weight_bytes(precision: Precision) -> int:
    """Bytes of one weight in the model; fp8 keeps bf16 weights and casts them, its casts are not counted."""
    return 4 if precision == "fp32" else 2
