"""The few numbers that training code reads back from its tensors, and what a rehearsal says they are.

Fake tensors hold none. What is read: how many tokens go to each expert (it decides shapes), how many labels count, and
whether losses and norms are finite. The first two are given here and followed through the operations between their
making and their reading; a float reads as 1. Anything else that is read is a surprise, and fails.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megagrok.rehearse.collectives import group_of
from megagrok.rehearse.load import Load
from megagrok.rehearse.pretence import constant_of, real_tensors

aten, c10d = torch.ops.aten, torch.ops.c10d
# Counts come out as they went in, through these.
_CARRIED = {
    aten.view.default, aten.select.int, aten.slice.Tensor, aten.stack.default, aten.sum.dim_IntList, aten.clone.default,
    aten.detach.default, aten.alias.default, aten._to_copy.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.cat.default, aten.expand.default, aten.t.default, aten.unbind.int,
}  # fmt: skip
NOT_HERE = object()


class KnownNumbers:
    """Answers in the place of operations whose result or shape depends on numbers. load: who gets how many tokens."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._values = WeakTensorKeyDictionary()

    def answer(self, operation: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """The result of an operation that fake tensors cannot do, or NOT_HERE."""
        if operation is aten.bincount.default:
            return self._count(arguments[0])
        if operation is aten._local_scalar_dense.default:
            return self._read(arguments[0])
        if operation is aten.repeat_interleave.Tensor:
            with real_tensors():
                total = int(self._values[arguments[0]].sum())
            return operation(*arguments, **(options | {"output_size": total}))
        return NOT_HERE

    def follow(self, operation: Any, arguments: Sequence[Any], options: dict[str, Any], result: Any) -> None:
        """Carry what is known of the arguments over to the result."""
        if operation is aten.sum.default and arguments[0].dtype == torch.bool:
            # Labels: every one counts.
            self._tell(result, lambda: torch.tensor(arguments[0].numel()))
        elif operation is c10d.allreduce_.default:
            for tensor in arguments[0]:
                self._multiply(tensor, group_of(arguments[1]).size())
        elif operation is c10d.alltoall_base_.default:
            if arguments[1] in self._values:
                self._tell(arguments[0], lambda: torch.tensor(self._load.incoming(self._values[arguments[1]].tolist())))
        elif operation in _CARRIED:
            self._carry(operation, arguments, options, result)

    def _count(self, experts: Tensor) -> Tensor:
        counts_E = experts.new_empty(self._load.num_experts)
        self._tell(counts_E, lambda: torch.tensor(self._load.outgoing(experts.numel())))
        return counts_E

    def _multiply(self, tensor: Tensor, ranks: int) -> None:
        """A sum over ranks that all have the same."""
        if tensor in self._values:
            self._tell(tensor, lambda: self._values[tensor] * ranks)

    def _read(self, tensor: Tensor) -> bool | int | float:
        known = self._values[tensor] if tensor in self._values else constant_of(tensor)
        if known is not None:
            with real_tensors():
                read: bool | int | float = known.item()
                return read
        assert tensor.is_floating_point() or tensor.dtype == torch.bool, "a count is read that nobody has given"
        return 1.0 if tensor.is_floating_point() else False

    def _carry(self, operation: Any, arguments: Sequence[Any], options: dict[str, Any], result: Any) -> None:
        """First argument and result are a tensor or several."""
        first = arguments[0]
        tensors = [first] if isinstance(first, Tensor) else first
        if not all(tensor in self._values for tensor in tensors):
            return
        known = [self._values[tensor] for tensor in tensors]
        with real_tensors():
            carried = operation(known[0] if isinstance(first, Tensor) else known, *arguments[1:], **options)
        for tensor, value in [(result, carried)] if isinstance(result, Tensor) else zip(result, carried, strict=True):
            self._values[tensor] = value

    def _tell(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        with real_tensors():
            self._values[tensor] = make()
