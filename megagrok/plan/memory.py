"""Bytes of weights, gradients and optimizer state on the fullest rank of each pipeline stage.

Not activations, communication buffers or the allocator's slack: those need the schedule. Who holds what: attention,
residual MLP, embedding and head are split over the tensor ranks; router and norms are whole on each; experts are whole
and shared out over the expert ranks. ZeRO shards dense state over the context * data ranks that hold the same dense
weights, and expert state over the tensor * context * data / expert ranks that hold the same experts.
"""

from dataclasses import dataclass

from megagrok.config.schema import ModelConfig, ParallelConfig, Precision
from megagrok.plan.params import (
    attention_params,
    embedding_params,
    expert_params,
    layer_norm_params,
    residual_ffn_params,
    router_params,
)

GRADIENT_BYTES = 4
"""fp32 in every precision: bf16 gradients are accumulated in fp32."""
MOMENT_BYTES = 8
"""AdamW's two moments, fp32."""
MASTER_BYTES = 4
"""DeepSpeed's sharded optimizer (ZeRO 1 and 2) updates its own fp32 copy of the weights, fp32 runs included."""


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


def state_bytes(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> tuple[StateBytes, ...]:
    """For each pipeline stage, first to last, the bytes on the fullest of its ranks.

    The layout has to be one that `megagrok.plan.check` accepts.
    """
    return tuple(
        _bytes_of(stage_params(model, parallel, stage), parallel, precision) for stage in range(parallel.pipeline)
    )


def stage_params(model: ModelConfig, parallel: ParallelConfig, stage: int) -> RankParams:
    """Parameters on each rank of pipeline stage `stage`. A tied embedding is also on the last stage, as the head."""
    layers = model.num_layers // parallel.pipeline
    split = attention_params(model) + residual_ffn_params(model)
    dense = layers * (split // parallel.tensor + router_params(model) + layer_norm_params(model))
    table = embedding_params(model) // parallel.tensor
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    if is_first:
        dense += table
    if is_last:
        dense += model.hidden
    if is_last and not (is_first and model.tied_embeddings):
        dense += table
    return RankParams(dense, layers * (model.moe.num_experts // parallel.expert) * expert_params(model))


def weight_bytes(precision: Precision) -> int:
    """Bytes of one weight in the model; fp8 keeps bf16 weights and casts them, its casts are not counted."""
    return 4 if precision == "fp32" else 2


def _bytes_of(params: RankParams, parallel: ParallelConfig, precision: Precision) -> StateBytes:
    num_params = params.dense + params.expert
    dense_copies = parallel.context * parallel.data
    expert_copies = parallel.tensor * parallel.context * parallel.data // parallel.expert
    sharded = -(-params.dense // dense_copies) + -(-params.expert // expert_copies)
    optimizer = num_params * MOMENT_BYTES if parallel.zero == 0 else sharded * (MASTER_BYTES + MOMENT_BYTES)
    # Whole at every ZeRO stage: the schedule accumulates all micro-batches before ZeRO 2 keeps its shard.
    return StateBytes(num_params * weight_bytes(precision), num_params * GRADIENT_BYTES, optimizer)
