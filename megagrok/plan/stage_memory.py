"""Bytes on the fullest rank of each pipeline stage at the peak of a step.

State from `memory.py`, what a layer keeps from `activations.py`, how often from `in_flight.py`, skew of the routing
from `imbalance.py`. A stage is fullest just before its first backward pass, or while it reduces its gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megagrok.config.schema import Recompute
from megagrok.plan.activations import LayerBytes, head_bytes, layer_bytes
from megagrok.plan.constants import CONTEXT_BYTES, SLACK
from megagrok.plan.cost import StageBytes
from megagrok.plan.imbalance import skew
from megagrok.plan.in_flight import chunks_in_flight
from megagrok.plan.memory import RankParams, StageLayers, params_of_layers, pipeline_layers, state_of, weight_bytes
from megagrok.plan.shape import Habits, Layout, Shape
from megagrok.plan.work import Slice

FLATTENED_ELEMENTS = 500_000_000
"""DeepSpeed flattens bf16 runs' fp32 gradients in runs of so many (0.19.8 engine.py, buffered_allreduce_fallback)."""
_NO_LAYER = LayerBytes(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Calls:
    """What one forward pass keeps and its backward pass needs, on any stage."""

    dense: LayerBytes
    expert: LayerBytes
    received: float
    """What came from the stage before, or out of the embedding."""
    gathered: float
    """Buffers for gathering what the tensor ranks split, which stay."""
    head_kept: float
    logits: float


def stage_memory(shape: Shape, layout: Layout, habits: Habits) -> tuple[StageBytes, ...]:
    """For each stage, first to last. The layout has to be one that the model divides into."""
    stages = _stages(shape, layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor, habits.evens_stages)
    calls = _calls(shape, Slice.of(layout), layout.recompute, layout.precision == "fp8", habits)
    skews = _skews(shape, layout, habits)
    found = []
    last_params, state = None, None
    for stage, (params, layers) in enumerate(stages):
        if params is not last_params or state is None:
            last_params, state = params, state_of(params, layout, habits)
            update = update_bytes(params, layout, habits)
        chunks = chunks_in_flight(layout.pipeline, layout.virtual_pipeline, layout.num_micro_batches, stage)
        waiting = chunks / layout.virtual_pipeline
        dense, expert = calls.dense, calls.expert
        activations = waiting * (layers.dense * dense.kept + layers.expert * expert.kept) + chunks * calls.received
        transient = expert.transient if layers.expert else 0.0
        if layers.dense and dense.transient > transient:
            transient = dense.transient
        logits = 0.0
        if stage == layout.pipeline - 1:
            # The head's backward pass comes before the last layer's, and its logits are gone by then.
            activations += calls.head_kept
            logits = calls.logits
            transient = max(0.0, transient - logits)
        transient += calls.gathered
        imbalance = 0.0
        if layers.expert and skews:
            imbalance = skews(layers.expert) * layers.expert * waiting * expert.kept_of_rows
            imbalance += max(0.0, skews(1) * expert.transient_of_rows)
        working = activations + transient + logits + imbalance
        found.append(
            StageBytes(
                state.weights,
                state.gradients,
                state.optimizer,
                int(activations),
                int(transient),
                int(logits),
                int(imbalance),
                int(max(0.0, update - working)),
                int(CONTEXT_BYTES + SLACK * working),
            )
        )
    return tuple(found)


def update_memory(shape: Shape, layout: Layout, habits: Habits) -> tuple[float, ...]:
    """Bytes allocated on each stage while gradients are reduced and weights updated, when activations are gone."""
    stages = _stages(shape, layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor, habits.evens_stages)
    calls = _calls(shape, Slice.of(layout), layout.recompute, layout.precision == "fp8", habits)
    return tuple(
        state_of(params, layout, habits).total + update_bytes(params, layout, habits) + calls.gathered
        for params, _ in stages
    )


def update_bytes(params: RankParams, layout: Layout, habits: Habits) -> float:
    """Buffers of the reduction of the gradients and of the update, beside the state."""
    num_params = params.dense + params.expert
    copies = layout.context * layout.data
    if habits.gathers_aside:
        # The whole and this rank's shard of it.
        return weight_bytes(layout.precision) * num_params * (1 + 1 / copies) if layout.zero and copies > 1 else 0.0
    if habits.fused or layout.zero == 3:
        return 0.0
    # DeepSpeed's bf16 optimizer reduces the experts' gradients where they lie.
    flattened = num_params if layout.precision == "fp32" else params.dense
    return 4.0 * min(flattened, FLATTENED_ELEMENTS) if copies * layout.tensor > 1 else 0.0


def _skews(shape: Shape, layout: Layout, habits: Habits) -> Callable[[int], float] | None:
    """How much fuller than the mean an expert rank is in one micro-batch of a hundred, over so many layers together:
    they are less skewed than any one of them. None if ranks are even."""
    if habits.routing == "balanced" or layout.expert == 1 or not shape.experts:
        return None
    own_tokens = layout.micro_batch * layout.seq_len / (layout.context * layout.tensor)
    choices = own_tokens * shape.top_k * layout.expert
    p99 = skew(shape.experts, shape.top_k, layout.expert, choices).p99
    return lambda layers: p99 / math.sqrt(layers)


@lru_cache(maxsize=4096)
def _stages(
    shape: Shape, tensor: int, pipeline: int, expert: int, expert_tensor: int, evens_stages: bool
) -> tuple[tuple[RankParams, StageLayers], ...]:
    layers = pipeline_layers(shape, pipeline, evens_stages)
    return tuple(
        (params_of_layers(shape, tensor, pipeline, expert, expert_tensor, own, stage), own)
        for stage, own in enumerate(layers)
    )


@lru_cache(maxsize=16384)
def _calls(shape: Shape, part: Slice, recompute: Recompute, is_fp8: bool, habits: Habits) -> _Calls:
    has_dense = shape.dense_layers > 0 or not shape.experts
    kept, logits = head_bytes(shape, part, habits)
    stream = part.element_bytes * shape.hidden
    return _Calls(
        layer_bytes(shape, part, recompute, is_fp8, habits, False) if has_dense else _NO_LAYER,
        layer_bytes(shape, part, recompute, is_fp8, habits, True) if shape.experts else _NO_LAYER,
        # Where layers are computed again, it is the first layer's own input.
        0.0 if recompute == "full" else stream * part.own_tokens,
        habits.gather_buffers * stream * part.tokens if part.sequence and part.tensor > 1 else 0.0,
        kept,
        logits,
    )
