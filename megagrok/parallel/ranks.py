"""The few things that ranks say to each other outside the training step: who I am, gather, barrier, any.

Not for tensors of the model: those travel in the collectives of Megatron and DeepSpeed. What goes through here is small
and is JSON (a file's digest, a verdict, a list of names), so that a rank can be handed no object, only values.

The one idea: code that needs a word from its peers takes a `Ranks`, and runs alone when given `Alone()`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, cast

import torch
import torch.distributed as dist

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


class Ranks(Protocol):
    """One process's view of its peers. `gather`, `barrier` and `any` are collective: all ranks call them, in order."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        ...

    def gather(self, value: JSON) -> list[JSON]:
        """Everyone's value, in rank order, on every rank. A tuple comes back as a list, as JSON has it."""
        ...

    def barrier(self) -> None:
        """Return once every rank has arrived."""
        ...

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is true on any."""
        ...


class Alone:
    """One process that has no peers."""

    rank = 0
    world_size = 1

    def gather(self, value: JSON) -> list[JSON]:
        """The value, as it would arrive from a peer: through JSON, so that one rank cannot see more than several do."""
        return [_decode(_encode(value))]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


class ProcessGroupRanks:
    """The ranks of a torch.distributed group; works on gloo (device cpu) and on nccl (this rank's GPU).

    group: the process group, or None for the default one, which must exist.
    device: where the group's backend wants its tensors.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._group = group
        self.device = torch.device("cpu") if device is None else device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def gather(self, value: JSON) -> list[JSON]:
        """Two collectives: the lengths, then the UTF-8 bytes padded to the longest. Waits on the host."""
        text = _encode(value)
        length = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length, group=self._group)
        sizes = [int(size.item()) for size in lengths]

        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        padded = padded.to(self.device)
        texts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, group=self._group)
        return [_decode(buffer[:size].cpu().numpy().tobytes()) for buffer, size in zip(texts, sizes, strict=True)]

    def barrier(self) -> None:
        """An all-reduce that the host waits for: unlike dist.barrier it means the same on gloo and on nccl."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """One all-reduce of one number."""
        raised = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return bool(raised.item())


def _encode(value: JSON) -> bytes:
    """Never empty: the shortest JSON text has one byte. NaN and infinities pass, a loss may be one."""
    return json.dumps(value).encode()


def _decode(text: bytes) -> JSON:
    return cast(JSON, json.loads(text))
