"""Every collective that passes torch's dispatcher: which group, which kind, how many bytes. Real peers or fake ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrok.rehearse.rehearsal import Direction, Traffic


@dataclass(frozen=True, slots=True)
class _Kind:
    """`op` in our words, and where in the arguments of torch's c10d operation the group and the whole tensor stand."""

    op: str
    group: int
    whole: int


_KINDS = {
    "c10d::allreduce_": _Kind("all_reduce", 1, 0),
    "c10d::allreduce_coalesced_": _Kind("all_reduce", 1, 0),
    "c10d::broadcast_": _Kind("broadcast", 1, 0),
    "c10d::reduce_": _Kind("reduce", 1, 0),
    "c10d::_allgather_base_": _Kind("all_gather", 2, 0),
    "c10d::allgather_": _Kind("all_gather", 2, 0),
    "c10d::allgather_into_tensor_coalesced_": _Kind("all_gather", 2, 0),
    "c10d::_reduce_scatter_base_": _Kind("reduce_scatter", 2, 1),
    "c10d::reduce_scatter_": _Kind("reduce_scatter", 2, 1),
    "c10d::alltoall_base_": _Kind("all_to_all", 2, 1),
    "c10d::send": _Kind("send", 1, 0),
    "c10d::recv_": _Kind("receive", 1, 0),
    "c10d::barrier": _Kind("barrier", 1, 0),
}
_PIPELINE_OPS = ("send", "receive")
_NOT_REPEATED = ("once", "start")


class Collectives:
    """A tally. `kinds`: name of each process group -> what it is (megagrok.parallel.groups.kinds_of_groups)."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = kinds
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, str]] = Counter()

    def note(self, operation: str, arguments: Sequence[Any], phase: str, direction: Direction | None) -> None:
        """Count one. phase: "build" is before the step.  direction: None outside of forward and backward passes."""
        kind = _KINDS[operation]
        group = group_of(arguments[kind.group])
        if group.size() == 1:
            return
        is_between_stages = kind.op in _PIPELINE_OPS
        # Megatron sends some messages between stages over the group of all ranks.
        name = "pipeline" if is_between_stages else self._kinds.get(group.group_name, "unknown")
        when = "start" if phase == "build" else direction or ("forward" if is_between_stages else "once")
        key = (name, kind.op, when)
        self._calls[key] += 1
        self._bytes[key] += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(arguments[kind.whole]))

    def traffic(self, micro_batches: int) -> tuple[Traffic, ...]:
        """What came, for one micro-batch of `micro_batches`, and for one step."""
        return tuple(
            Traffic(
                group,
                op,
                direction,  # type: ignore[arg-type]
                calls / (1 if direction in _NOT_REPEATED else micro_batches),
                self._bytes[group, op, direction] / (1 if direction in _NOT_REPEATED else micro_batches),
            )
            for (group, op, direction), calls in sorted(self._calls.items())
        )


def group_of(boxed: torch.ScriptObject) -> dist.ProcessGroup:
    """The process group that the dispatcher carries in a box."""
    group: dist.ProcessGroup = dist.ProcessGroup.unbox(boxed)
    return group


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)]
