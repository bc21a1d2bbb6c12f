"""The life of every storage: when it was made, in which call, when it was freed. What is at a peak is asked afterwards.

Works because a fake tensor's storage has a size and a lifetime like any other, only no bytes.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Storage:
    """born, died: moments, which count operations. died is None while it lives."""

    size: int
    born: int
    phase: str
    is_head: bool
    is_backward: bool
    died: int | None = None


class Storages:
    """Told of every tensor that an operation returns."""

    def __init__(self) -> None:
        self.moment = 0
        self._lives: list[Storage] = []
        self._alive: dict[int, tuple[Storage, weakref.ref[torch.UntypedStorage]]] = {}

    def note(self, tensors: Iterable[Tensor], *, phase: str, is_head: bool, is_backward: bool) -> None:
        """An operation returned these; views share a storage that is known already."""
        self.moment += 1
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            # Tensors of the device "meta" have a size on paper only (DeepSpeed lays out its buckets with them).
            if key in self._alive or not storage.nbytes() or tensor.device.type == "meta":
                continue
            life = Storage(storage.nbytes(), self.moment, phase, is_head, is_backward)
            self._lives.append(life)
            self._alive[key] = (life, weakref.ref(storage, self._burial(key)))

    def life_of(self, tensor: Tensor) -> Storage | None:
        """The storage that a tensor lies in, if an operation made it."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def peak(self, first: int, last: int) -> list[Storage]:
        """What lived at the fullest moment from `first` to `last`."""
        change = [0] * (last - first + 2)
        for life in self._lives:
            begin, end = max(life.born, first), last + 1 if life.died is None else min(life.died, last + 1)
            if begin < end:
                change[begin - first] += life.size
                change[end - first] -= life.size
        fullest, most, current = first, -1, 0
        for offset, difference in enumerate(change[:-1]):
            current += difference
            if current > most:
                fullest, most = first + offset, current
        return [life for life in self._lives if life.born <= fullest and (life.died is None or life.died > fullest)]

    def _burial(self, key: int) -> Callable[[object], None]:
        def bury(_: object) -> None:
            life, _ref = self._alive.pop(key)
            # Freed after the operation that is over: the next one finds its room.
            life.died = self.moment + 1

        return bury
