"""Which parts of which global tensors a rank's parameters hold. The bridge between a layout and the global names.

Megatron fuses q, k and v, stacks gate and up, and splits by rows or columns; experts are stacked. Every parameter is
still a row of rectangular blocks of global tensors, each contiguous in the parameter's own memory. Initial values,
checkpoints, export and verify-layout all read this one map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megagrok.config.schema import ModelConfig
from megagrok.model.grok import GrokModel
from megagrok.model.init import initial_value
from megagrok.model.moe.experts import Experts
from megagrok.model.names import EMBEDDING, FINAL_NORM, LM_HEAD
from megagrok.parallel.groups import ProcessGroups


@dataclass(frozen=True, slots=True)
class Part:
    """A block of the global tensor `name` that lies at `offset` in the flattened local parameter."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Elements of the block."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """One parameter of this rank and what it holds."""

    parameter: nn.Parameter
    parts: tuple[Part, ...]
    is_expert: bool = False
    is_replicated_over_tensor: bool = False
    """Every tensor rank holds all of it."""
    is_tied_copy: bool = False
    """The last stage's copy of the embedding: the first stage's one counts."""


def local_parameters(chunk: GrokModel) -> list[LocalParameter]:
    """Every parameter of a model chunk, in the order of the forward pass.

    Fails if a parameter is missing from the map, or held by it without covering it whole: that would be our bug.
    """
    found = list(_walk(chunk))
    assert {id(item.parameter) for item in found} == {id(parameter) for parameter in chunk.parameters()}
    for item in found:
        assert sum(part.size for part in item.parts) == item.parameter.numel(), item.parts
    return found


@torch.no_grad()
def fill_initial_values(parameters: list[LocalParameter], model: ModelConfig, seed: int) -> None:
    """Give every parameter its first value, which depends on its global name and the seed and on nothing else."""
    for item in parameters:
        flat = item.parameter.view(-1)
        for part in item.parts:
            value = initial_value(part.name, model, seed, start=part.start, shape=part.shape, dtype=flat.dtype)
            flat[part.offset : part.offset + part.size] = value.flatten().to(flat.device)


def _walk(chunk: GrokModel) -> Iterator[LocalParameter]:
    groups: ProcessGroups = chunk.config.groups
    tensor_rank = groups.coordinates.tensor
    vocabulary_rows = chunk.config.grok.vocab_size // groups.topology.tensor
    if chunk.pre_process:
        yield _rows(chunk.embedding.word_embeddings.weight, EMBEDDING, tensor_rank * vocabulary_rows)
    for layer in chunk.decoder.layers:
        yield from _walk_layer(layer, chunk.config.grok, groups)
    if chunk.decoder.final_layernorm is not None:
        yield _whole(chunk.decoder.final_layernorm.weight, FINAL_NORM)
    if chunk.post_process and chunk.output_layer.weight is not None:
        is_copy = chunk.config.grok.tied_embeddings
        name = EMBEDDING if is_copy else LM_HEAD
        yield _rows(chunk.output_layer.weight, name, tensor_rank * vocabulary_rows, is_tied_copy=is_copy)


def _walk_layer(layer: TransformerLayer, model: ModelConfig, groups: ProcessGroups) -> Iterator[LocalParameter]:
    prefix = f"model.layers.{layer.layer_number - 1}"
    tensor_rank, tensor_size = groups.coordinates.tensor, groups.topology.tensor
    yield _whole(layer.input_layernorm.weight, f"{prefix}.pre_attn_norm.weight")
    yield _fused_qkv(layer.self_attention.linear_qkv.weight, f"{prefix}.self_attn", model, tensor_rank, tensor_size)
    yield _columns(layer.self_attention.linear_proj.weight, f"{prefix}.self_attn.o_proj.weight", tensor_rank)
    yield _whole(layer.self_attn_bda.norm.weight, f"{prefix}.post_attn_norm.weight")
    yield _whole(layer.pre_mlp_layernorm.weight, f"{prefix}.pre_moe_norm.weight")
    yield _whole(layer.mlp.router.weight, f"{prefix}.block_sparse_moe.gate.weight")
    first_expert = groups.coordinates.expert * layer.mlp.num_local_experts
    yield from _experts(layer.mlp.experts, f"{prefix}.block_sparse_moe.experts", first_expert)
    if layer.mlp.residual is not None:
        yield _fused_gate_up(layer.mlp.residual.linear_fc1.weight, f"{prefix}.mlp", tensor_rank)
        yield _columns(layer.mlp.residual.linear_fc2.weight, f"{prefix}.mlp.down_proj.weight", tensor_rank)
    yield _whole(layer.mlp_bda.norm.weight, f"{prefix}.post_moe_norm.weight")


def _whole(parameter: nn.Parameter, name: str) -> LocalParameter:
    part = Part(name, (0,) * parameter.dim(), tuple(parameter.shape), 0)
    return LocalParameter(parameter, (part,), is_replicated_over_tensor=True)


def _rows(parameter: nn.Parameter, name: str, first_row: int, *, is_tied_copy: bool = False) -> LocalParameter:
    return LocalParameter(
        parameter, (Part(name, (first_row, 0), tuple(parameter.shape), 0),), is_tied_copy=is_tied_copy
    )


def _columns(parameter: nn.Parameter, name: str, tensor_rank: int) -> LocalParameter:
    first_column = tensor_rank * parameter.shape[1]
    return LocalParameter(parameter, (Part(name, (0, first_column), tuple(parameter.shape), 0),))


def _fused_qkv(
    parameter: nn.Parameter, prefix: str, model: ModelConfig, tensor_rank: int, tensor_size: int
) -> LocalParameter:
    """Megatron's order: for each kv head its query heads, then its key, then its value."""
    width, heads_per_kv = model.head_dim, model.num_heads // model.num_kv_heads
    local_kv_heads = model.num_kv_heads // tensor_size
    parts, offset = [], 0
    for kv_head in range(tensor_rank * local_kv_heads, (tensor_rank + 1) * local_kv_heads):
        for name, heads in (("q_proj", heads_per_kv), ("k_proj", 1), ("v_proj", 1)):
            rows = heads * width
            parts.append(Part(f"{prefix}.{name}.weight", (kv_head * rows, 0), (rows, model.hidden), offset))
            offset += rows * model.hidden
    return LocalParameter(parameter, tuple(parts))


def _fused_gate_up(parameter: nn.Parameter, prefix: str, tensor_rank: int) -> LocalParameter:
    rows, hidden = parameter.shape[0] // 2, parameter.shape[1]
    parts = (
        Part(f"{prefix}.gate_proj.weight", (tensor_rank * rows, 0), (rows, hidden), 0),
        Part(f"{prefix}.up_proj.weight", (tensor_rank * rows, 0), (rows, hidden), rows * hidden),
    )
    return LocalParameter(parameter, parts)


def _experts(experts: Experts, prefix: str, first_expert: int) -> Iterator[LocalParameter]:
    num_local, double_width, hidden = experts.gate_up_eFD.shape
    width = double_width // 2
    gate_up, down = [], []
    for local in range(num_local):
        expert = f"{prefix}.{first_expert + local}"
        offset = local * double_width * hidden
        gate_up.append(Part(f"{expert}.w1.weight", (0, 0), (width, hidden), offset))
        gate_up.append(Part(f"{expert}.w3.weight", (0, 0), (width, hidden), offset + width * hidden))
        down.append(Part(f"{expert}.w2.weight", (0, 0), (hidden, width), local * width * hidden))
    yield LocalParameter(experts.gate_up_eFD, tuple(gate_up), is_expert=True)
    yield LocalParameter(experts.down_eDF, tuple(down), is_expert=True)
