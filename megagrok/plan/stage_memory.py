"""Bytes on the fullest rank of each pipeline stage at the peak of a step.

State from `memory.py`, what a layer keeps from `activations.py`, how often from `in_flight.py`, skew of the routing
from `imbalance.py`. A stage is fullest just before its first backward pass, or in the reduction of its gradients.
"""

from megagrok.plan.activations import LayerBytes, head_bytes, layer_bytes
from megagrok.plan.cost import StageBytes
from megagrok.plan.imbalance import skew
from megagrok.plan.in_flight import chunks_in_flight
from megagrok.plan.memory import held_params, stage_layers, state_of
from megagrok.plan.shape import Habits, Layout, Shape
from megagrok.plan.work import Slice

CONTEXT_BYTES = 1_200_000_000
"""CUDA context, cuBLAS and NCCL's code and buffers: 1 to 3 GB are seen beside torch's own memory. An estimate."""
SLACK = 0.04
"""Of activations: what the allocator holds and cannot give out, with expandable segments. An estimate."""
FLATTENED_ELEMENTS = 500_000_000
"""DeepSpeed's bf16 optimizer flattens fp32 gradients in runs of so many to reduce them (deepspeed 0.19.8 engine.py,
buffered_allreduce_fallback)."""
_NO_LAYER = LayerBytes(0.0, 0.0, 0.0, 0.0)


def stage_memory(shape: Shape, layout: Layout, habits: Habits) -> tuple[StageBytes, ...]:
    """For each stage, first to last."""
    part = Slice.of(layout)
    is_fp8 = layout.precision == "fp8"
    num_dense = shape.layers if not shape.experts else shape.dense_layers
    dense = layer_bytes(shape, part, layout.recompute, is_fp8, habits, False) if num_dense else _NO_LAYER
    expert = layer_bytes(shape, part, layout.recompute, is_fp8, habits, True) if shape.experts else _NO_LAYER
    return tuple(_stage(shape, layout, habits, part, dense, expert, stage) for stage in range(layout.pipeline))


def _stage(
    shape: Shape, layout: Layout, habits: Habits, part: Slice, dense: LayerBytes, expert: LayerBytes, stage: int
) -> StageBytes:
    pipeline = layout.pipeline
    params = held_params(shape, layout.tensor, pipeline, layout.expert, layout.expert_tensor, stage)
    state = state_of(params, layout, habits)
    layers = stage_layers(shape, pipeline, stage)
    chunks = chunks_in_flight(pipeline, layout.virtual_pipeline, layout.num_micro_batches, stage)
    calls = chunks / layout.virtual_pipeline
    stream = part.element_bytes * part.own_tokens * shape.hidden
    # What came from the stage before, or out of the embedding, for each call that waits.
    activations = calls * (layers.dense * dense.kept + layers.expert * expert.kept) + chunks * stream
    transient = max(dense.transient if layers.dense else 0.0, expert.transient if layers.expert else 0.0)
    logits = 0.0
    if stage == pipeline - 1:
        kept, logits = head_bytes(shape, part, habits)
        activations += kept
        transient = max(0.0, transient - logits)
    if layout.sequence:
        # Megatron's one buffer for gathering what the tensor ranks split.
        transient += part.element_bytes * part.tokens * shape.hidden
    imbalance = 0.0
    if habits.routing == "natural" and layers.expert and layout.expert > 1:
        choices = part.tokens / part.tensor * shape.top_k * layout.expert
        one = skew(shape.experts, shape.top_k, layout.expert, choices).p99
        mean = skew(shape.experts, shape.top_k, layout.expert, choices, layers.expert).p99
        imbalance = mean * calls * layers.expert * expert.kept_of_rows + max(0.0, one * expert.transient_of_rows)
    working = activations + transient + logits + imbalance
    communication = max(0.0, _reduction_bytes(params.dense + params.expert, layout, habits) - working)
    return StageBytes(
        state.weights,
        state.gradients,
        state.optimizer,
        int(activations),
        int(transient),
        int(logits),
        int(imbalance),
        int(communication),
        int(CONTEXT_BYTES + SLACK * working),
    )


def _reduction_bytes(num_params: int, layout: Layout, habits: Habits) -> float:
    """Buffers of the gradients' reduction, when the activations are gone."""
    if layout.world_size == 1 or habits.fused:
        return 0.0
    return 4.0 * min(num_params, FLATTENED_ELEMENTS)
