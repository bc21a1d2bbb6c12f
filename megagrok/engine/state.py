"""Engine state as fragments of global tensors, and back. The only file that knows both a shard and a fragment.

weight/NAME       fp32 master weights      (bf16 weights are these, rounded)
exp_avg/NAME      AdamW's first moment
exp_avg_sq/NAME   AdamW's second moment
router_load/N     share of the previous step's choices that went to each expert of layer N, fp64
gradient/NAME     reduced gradients; for verify-layout, never saved
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megagrok.checkpoint import Checkpoint, Fragment
from megagrok.config.schema import ModelConfig
from megagrok.engine.optimizer import MOMENTS, Shard
from megagrok.errors import CheckpointError
from megagrok.model.grok import GrokModel
from megagrok.model.names import parameter_shapes
from megagrok.model.parts import LocalParameter, Part
from megagrok.parallel.groups import ProcessGroups

WEIGHT, GRADIENT, ROUTER_LOAD = "weight", "gradient", "router_load"


def shard_fragments(held: list[Shard], model: ModelConfig, groups: ProcessGroups, *, zero: int) -> Iterator[Fragment]:
    """Weights and moments of this rank's shards; over all ranks every element comes exactly once."""
    for shard in held:
        if is_spoken_for(shard.owner, groups, zero=zero):
            for kind, values in {WEIGHT: shard.weight, **shard.moments}.items():
                yield from cut(kind, shard.owner, shard.begin, shard.end, values, model)


def router_fragments(chunks: list[GrokModel], groups: ProcessGroups) -> Iterator[Fragment]:
    """Each layer's router load, from one rank of its stage."""
    place = groups.coordinates
    if place.tensor == place.context == place.data == 0:
        for number, load_E in _router_loads(chunks):
            shape = tuple(load_E.shape)
            yield Fragment(f"{ROUTER_LOAD}/{number}", shape, (0,), shape, 0, load_E.numel(), load_E)


@torch.no_grad()
def load_state(
    checkpoint: Checkpoint, parameters: list[LocalParameter], held: list[Shard], chunks: list[GrokModel]
) -> None:
    """Read this rank's weights, shards and router loads, whatever layout wrote them. Raises CheckpointError; nothing
    is changed if the checkpoint is of another model."""
    _check_model(checkpoint, chunks[0].config.grok)
    for item in parameters:
        flat = item.parameter.data.view(-1)
        for part in item.parts:
            flat[part.offset : part.offset + part.size] = _read(checkpoint, WEIGHT, part).to(flat)
    for shard in held:
        for kind, values in {WEIGHT: shard.weight, **shard.moments}.items():
            for part, low, high in _overlaps(shard.owner, shard.begin, shard.end):
                begin = part.offset + low - shard.begin
                values[begin : begin + high - low] = _read(checkpoint, kind, part)[low:high].to(values)
    for number, load_E in _router_loads(chunks):
        load_E.copy_(checkpoint.read(f"{ROUTER_LOAD}/{number}", (0,), tuple(load_E.shape)))


def cut(
    kind: str, owner: LocalParameter, begin: int, end: int, values: Tensor, model: ModelConfig
) -> Iterator[Fragment]:
    """Elements begin..end of a flattened local parameter as fragments of the global tensors `kind`/NAME."""
    shapes = parameter_shapes(model)
    for part, low, high in _overlaps(owner, begin, end):
        first = part.offset + low - begin
        data = values[first : first + high - low].detach()
        yield Fragment(f"{kind}/{part.name}", shapes[part.name], part.start, part.shape, low, high, data)


def is_spoken_for(item: LocalParameter, groups: ProcessGroups, *, zero: int) -> bool:
    """True on exactly one of the ranks that hold the same elements of a shard."""
    place = groups.coordinates
    if item.is_tied_copy or (item.is_replicated_over_tensor and place.tensor > 0):
        return False
    if zero:
        return True
    return place.expert_data == 0 if item.is_expert else place.data == place.context == 0


def _check_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """The checkpoint holds the state of this model, no tensor less, none more, all of the same shape."""
    kinds = (WEIGHT, *MOMENTS)
    wanted = {f"{kind}/{name}": shape for kind in kinds for name, shape in parameter_shapes(model).items()}
    wanted |= {f"{ROUTER_LOAD}/{number}": (model.moe.num_experts,) for number in range(model.num_layers)}
    names = [name for name in checkpoint.names() if name.split("/")[0] in (*kinds, ROUTER_LOAD)]
    found = {name: tuple(checkpoint.shape_of(name)) for name in names}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        there, here = (f"shape {side[name]}" if name in side else "no such tensor" for side in (found, wanted))
        raise CheckpointError(
            f"{checkpoint.path}: is of another model. {name}: {there} there, {here} in the configuration; "
            f"{len(differing)} tensors differ. Load it with the model that it was saved with."
        )


def _overlaps(owner: LocalParameter, begin: int, end: int) -> Iterator[tuple[Part, int, int]]:
    """Parts that elements begin..end of the parameter touch, with the range inside each part."""
    for part in owner.parts:
        low, high = max(begin, part.offset) - part.offset, min(end, part.offset + part.size) - part.offset
        if low < high:
            yield part, low, high


def _read(checkpoint: Checkpoint, kind: str, part: Part) -> Tensor:
    return checkpoint.read(f"{kind}/{part.name}", part.start, part.shape).flatten()


def _router_loads(chunks: list[GrokModel]) -> Iterator[tuple[int, Tensor]]:
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            yield layer.layer_number - 1, layer.mlp.router.load_E
