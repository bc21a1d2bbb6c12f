"""Seconds of one step on the critical path, by what they go to: work over rates, messages over links, a schedule.

micro-batch of a stage = its layers (+ embedding, + head), each max(device, host)
step = micro-batches x heaviest stage + fill and drain + what data ranks exchange + update + stragglers
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from megagrok.config.schema import Precision
from megagrok.plan.constants import CONSTANTS, Constants
from megagrok.plan.cost import Machine, StepSeconds
from megagrok.plan.network import Span, message_seconds
from megagrok.plan.shape import Habits, Layout, Shape
from megagrok.plan.work import (
    ATTENTION_PASSES,
    Matmul,
    Message,
    Slice,
    Work,
    embedding_work,
    head_work,
    layer_work,
    stage_params,
    update_messages,
)


@dataclass(frozen=True, slots=True)
class Part:
    """Forward and backward pass of a part of the model for one micro-batch on one rank, in seconds."""

    matmul: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    launch: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    forward: float = 0.0
    """Of their sum, what a recomputed layer spends once more."""
    core: float = 0.0
    """Of it, what lies in the attention core."""

    @property
    def total(self) -> float:
        """Both passes."""
        busy = self.matmul + self.experts + self.attention + self.memory_bound
        return busy + self.launch + self.tensor + self.context + self.expert

    def plus(self, times: float, other: "Part") -> "Part":
        """This and `times` the other."""
        return Part(
            self.matmul + times * other.matmul,
            self.experts + times * other.experts,
            self.attention + times * other.attention,
            self.memory_bound + times * other.memory_bound,
            self.launch + times * other.launch,
            self.tensor + times * other.tensor,
            self.context + times * other.context,
            self.expert + times * other.expert,
            self.forward + times * other.forward,
            self.core + times * other.core,
        )


@dataclass(frozen=True, slots=True)
class Model:
    """One micro-batch through the whole model on one tensor, context and expert rank."""

    layers: Part
    """All of them together."""
    head: Part
    embedding: Part


def step_seconds(
    shape: Shape, layout: Layout, machine: Machine, habits: Habits, constants: Constants = CONSTANTS
) -> StepSeconds:
    """Seconds of one step. The layout has to be one that the model divides into."""
    part = Slice.of(layout)
    model = model_seconds(shape, part, layout.precision, machine, habits, constants)
    stages, chunks, count = layout.pipeline, layout.virtual_pipeline, layout.num_micro_batches
    mean = Part().plus(1 / stages, model.layers).plus(1 / stages, model.head).plus(1 / stages, model.embedding)
    again = {"none": 0.0, "selective": model.layers.core, "full": model.layers.forward}[layout.recompute] / stages
    heaviest = max(mean.total, _heaviest_stage(shape, stages, model, habits.evens_stages))
    bubble = (stages - 1) / chunks * (mean.total + again) + count * (heaviest - mean.total)
    pipeline = _pipeline_seconds(shape, layout, part, machine, habits, constants)
    skew = constants.natural if habits.routing == "natural" and shape.experts and layout.expert > 1 else 0.0
    imbalance = count * skew * (mean.experts + mean.expert)
    data = _data_seconds(shape, layout, machine, habits, constants, mean.total)
    optimizer = _update_seconds(shape, layout, machine, constants)
    busy = count * (mean.total + again) + bubble + pipeline + imbalance + data + optimizer
    nodes = max(1.0, layout.world_size / machine.gpus_per_node)
    return StepSeconds(
        matmul=count * (mean.matmul + mean.experts),
        attention=count * mean.attention,
        memory_bound=count * mean.memory_bound,
        recompute=count * again,
        launch=count * mean.launch + constants.step,
        tensor=count * mean.tensor,
        context=count * mean.context,
        expert=count * mean.expert,
        pipeline=pipeline,
        data=data,
        imbalance=imbalance + constants.straggler * math.log2(nodes) * busy,
        bubble=bubble,
        optimizer=optimizer,
    )


@lru_cache(maxsize=4096)
def model_seconds(
    shape: Shape, part: Slice, precision: Precision, machine: Machine, habits: Habits, constants: Constants
) -> Model:
    """What many layouts share: only tensor, context and expert ranks, micro-batch and precision decide it."""
    rates = _Rates(precision, machine, habits, constants, shape.top_k)
    moe = shape.layers - shape.dense_layers if shape.experts else 0
    layers = Part()
    if moe:
        layers = layers.plus(moe, rates.part_seconds(layer_work(shape, part, habits, True), part))
    if moe < shape.layers:
        layers = layers.plus(shape.layers - moe, rates.part_seconds(layer_work(shape, part, habits, False), part))
    # The head stays out of fp8.
    plain = _Rates("bf16" if precision == "fp8" else precision, machine, habits, constants, shape.top_k)
    return Model(
        layers, plain.part_seconds(head_work(shape, part), part), plain.part_seconds(embedding_work(shape, part), part)
    )


@dataclass(frozen=True, slots=True)
class _Rates:
    """How fast this machine and this trainer do a part's work."""

    precision: Precision
    machine: Machine
    habits: Habits
    constants: Constants
    top_k: int

    def part_seconds(self, work: Work, part: Slice) -> Part:
        """Both passes of a part."""
        constants, habits, gpu = self.constants, self.habits, self.machine.gpu
        bandwidth = gpu.memory_bandwidth * constants.memory
        expert_precision = "bf16" if self.precision == "fp8" and not habits.experts_in_fp8 else self.precision
        matmul = sum(self._matmul_seconds(item, self.precision, 1.0, part) for item in work.matmuls)
        experts = sum(
            self._matmul_seconds(item, expert_precision, constants.expert_matmul, part) for item in work.expert_matmuls
        )
        cast = sum(self._cast_bytes(item, self.precision) for item in work.matmuls)
        cast += sum(self._cast_bytes(item, expert_precision) for item in work.expert_matmuls)
        slower = 1.0 if habits.fused else constants.eager
        peak = gpu.peak("bf16" if self.precision == "fp8" else self.precision)
        flash = constants.attention if habits.fused else constants.older_attention
        peak *= {"flash": flash, "triton": constants.triton_attention, "scores": constants.attention}[habits.attention]
        core = work.attention_flops / peak + work.score_bytes / bandwidth
        attention = core * ATTENTION_PASSES
        moved = (3 * constants.moved * slower * work.moved_bytes + cast) / bandwidth
        tensor = self._messages_seconds(work, part, "tensor", constants.tensor_hidden * habits.overlaps_tensor)
        context = self._messages_seconds(work, part, "context", constants.context_hidden * habits.fused)
        expert = self._messages_seconds(work, part, "expert", constants.expert_hidden * habits.overlaps_expert)
        host = 3 * work.kernels * constants.launch * (constants.launch_fp8 if self.precision == "fp8" else 1.0)
        host *= constants.graphed if habits.graphs else 1.0
        busy = matmul + experts + attention + moved + tensor + context + expert
        # The host runs ahead of a busy device: only what the device does not cover is waited for.
        launch = max(0.0, host - busy)
        return Part(
            matmul,
            experts,
            attention,
            moved,
            launch,
            tensor,
            context,
            expert,
            forward=(busy + launch - attention) / 3 + core,
            core=core,
        )

    def _matmul_seconds(self, item: Matmul, precision: Precision, share: float, part: Slice) -> float:
        """Arithmetic, then traffic: forward y = a b, backward both gradients; b's is added to a sum in fp32."""
        constants, habits = self.constants, self.habits
        rate = self.machine.gpu.peak(precision) * share
        rate *= constants.matmul_fp8 if precision == "fp8" else constants.matmul_bf16
        a, b, y = item.rows * item.inner, item.inner * item.outer, item.rows * item.outer
        size, wide = 1 if precision == "fp8" else part.element_bytes, part.element_bytes
        summed = 8 if habits.fused else 18
        traffic = item.count * (2 * size * (a + b + y) + 2 * wide * (a + y) + summed * b)
        bandwidth = self.machine.gpu.memory_bandwidth * constants.memory
        return 3 * item.flops / rate + constants.matmul_traffic * traffic / bandwidth

    def _cast_bytes(self, item: Matmul, precision: Precision) -> float:
        if precision != "fp8":
            return 0.0
        elements = item.rows * item.inner + item.inner * item.outer + item.rows * item.outer
        return self.constants.cast_fp8 * item.count * elements

    def _messages_seconds(self, work: Work, part: Slice, group: str, hidden: float) -> float:
        span = {
            "tensor": Span(part.tensor, 1),
            "context": Span(part.context, part.tensor),
            "expert": Span(part.expert, part.expert_tensor),
        }[group]
        seconds = sum(
            message_seconds(message, span, self.machine, self.habits, self.constants, self.top_k)
            for message in (*work.forward, *work.backward)
            if message.group == group
        )
        return (1 - hidden) * seconds


def _heaviest_stage(shape: Shape, stages: int, model: Model, evens: bool) -> float:
    """Seconds of the stage that the others wait for: the one with the output head, or one with a layer more."""
    if stages == 1:
        return 0.0
    layer, head = model.layers.total / shape.layers, model.head.total
    if shape.layers % stages == 0 and not evens:
        return shape.layers // stages * layer + head
    return min(
        max(last * layer + head, math.ceil((shape.layers - last) / (stages - 1)) * layer)
        for last in range(shape.layers // stages + 2)
    )


def _pipeline_seconds(
    shape: Shape, layout: Layout, part: Slice, machine: Machine, habits: Habits, constants: Constants
) -> float:
    if layout.pipeline == 1:
        return 0.0
    size = part.own_tokens * shape.hidden * part.element_bytes
    span = Span(2, layout.tensor * layout.context * layout.data)
    hop = message_seconds(Message("pipeline", "send", size), span, machine, habits, constants, 1) + constants.hop
    chunks = layout.virtual_pipeline
    waited = 1.0 if chunks == 1 else constants.interleaved_hop
    # There and back, for each micro-batch and chunk; then once through all stages.
    return 2 * hop * (waited * chunks * layout.num_micro_batches + layout.pipeline - 1)


def _data_seconds(
    shape: Shape, layout: Layout, machine: Machine, habits: Habits, constants: Constants, micro_batch: float
) -> float:
    """Gradients out and weights back, less what hides behind backward passes (all of them under FSDP)."""
    copies = layout.data * layout.context
    spans = {
        "data": Span(copies, layout.tensor),
        "expert_data": Span(
            max(1, layout.tensor * copies // (layout.expert * layout.expert_tensor)),
            layout.expert * layout.expert_tensor,
        ),
    }
    seconds = sum(
        message_seconds(message, spans[message.group], machine, habits, constants, 1)
        for message in update_messages(shape, layout, habits, 0)
    )
    if not habits.overlaps_data:
        return seconds
    room = layout.num_micro_batches * micro_batch if layout.zero == 3 else 2 / 3 * micro_batch
    return max(seconds * (1 - constants.data_hidden), seconds - room)


def _update_seconds(shape: Shape, layout: Layout, machine: Machine, constants: Constants) -> float:
    held = stage_params(shape, layout, 0)
    params = float(held.dense + held.expert)
    if layout.zero:
        copies = layout.data * layout.context
        expert_copies = max(1, layout.tensor * copies // (layout.expert * layout.expert_tensor))
        params = held.dense / copies + held.expert / expert_copies
    return params * constants.update / (machine.gpu.memory_bandwidth * constants.memory)
