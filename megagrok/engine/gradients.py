"""What a layout has split in the gradients, made whole before DeepSpeed reduces them over the data ranks; and the one
gradient norm that DeepSpeed gets wrong.

Megatron has the first two as private helpers of its own trainer (distributed/finalize_model_grads.py), tied to its
gradient buffers; here they are two all-reduces.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megagrok.model.names import EMBEDDING
from megagrok.model.parts import LocalParameter
from megagrok.parallel.groups import ProcessGroups

GradientOf = Callable[[nn.Parameter], Tensor]


def sum_over_tensor_ranks(parameters: Iterable[LocalParameter], groups: ProcessGroups, gradient_of: GradientOf) -> None:
    """Sum the gradients of parameters whose tensor ranks saw different tokens: norms under sequence parallelism, and
    routers. They carry the tag `sequence_parallel`. Collective over the tensor ranks."""
    if groups.topology.tensor == 1:
        return
    split = [item.parameter for item in parameters if getattr(item.parameter, "sequence_parallel", False)]
    if split:
        _all_reduce_together([gradient_of(parameter) for parameter in split], groups.tensor)


def sum_tied_embeddings(parameters: Iterable[LocalParameter], groups: ProcessGroups, gradient_of: GradientOf) -> None:
    """Sum the gradients of the embedding and of its copy on the last stage. Called for tied models, and collective
    over the embedding ranks."""
    if groups.topology.pipeline == 1 or groups.embedding is None:
        return
    for item in parameters:
        if item.is_tied_copy or item.parts[0].name == EMBEDDING:
            dist.all_reduce(gradient_of(item.parameter), group=groups.embedding)


def global_norm(parameters: Iterable[LocalParameter], groups: ProcessGroups, gradient_of: GradientOf) -> Tensor:
    """Norm of the model's gradient, each parameter counted once, whatever the layout. Collective over all ranks.

    For ZeRO 0 only, whose clipping in DeepSpeed does not know experts (deepspeed 0.19.8 runtime/utils.py:356). Reduced
    gradients are equal on the ranks that hold the same weights, so each rank gives its share of the square.
    """
    square = torch.zeros((), dtype=torch.float64)
    for item in parameters:
        if item.is_tied_copy or (item.is_replicated_over_tensor and groups.coordinates.tensor > 0):
            continue
        copies = dist.get_world_size(groups.expert_data if item.is_expert else groups.data)
        gradient = gradient_of(item.parameter)
        square = (
            square.to(gradient.device) + torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2 / copies
        )
    dist.all_reduce(square)
    return square.sqrt().float()


def _all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    flat = _flatten_dense_tensors(tensors)
    dist.all_reduce(flat, group=group)
    for tensor, reduced in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
        tensor.copy_(reduced)
