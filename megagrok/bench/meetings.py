"""Every collective and every message of this process, as it happens: when it was issued, and when the rank stood still.

Both libraries reach the network through torch.distributed, and torch.distributed through the methods of `ProcessGroup`
and `Work.wait`. There is no hook there, so `recorded` puts its own functions in their place, for a few steps of a
benchmark process and no longer. It changes neither what is sent nor when.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Work

from megagrok.parallel.groups import ProcessGroups

_MESSAGES = ("send", "recv")
# The names of torch 2.8 and of 2.13; a version has those that it has.
_COLLECTIVES = (
    "allreduce", "broadcast", "reduce", "allgather", "gather", "scatter", "reduce_scatter", "alltoall", "barrier",
    "_allgather_base", "_reduce_scatter_base", "alltoall_base", "all_gather_single", "reduce_scatter_single",
    "all_to_all_single", "allreduce_coalesced", "allgather_coalesced",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Met:
    """One collective or message of this rank, on the clock that time.perf_counter reads."""

    meeting: str
    """Equal on all ranks that take part, and on no other meeting."""
    row: str
    is_message: bool
    issued: float
    issued_end: float


@dataclass(frozen=True, slots=True)
class Stood:
    """A call of `wait` for a meeting."""

    meeting: str
    start: float
    end: float


@dataclass(slots=True)
class Record:
    """Everything since the recording began, in order."""

    met: list[Met] = field(default_factory=list)
    stood: list[Stood] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.met.clear()
        self.stood.clear()


@contextmanager
def recorded(groups: ProcessGroups) -> Iterator[Record]:
    """Record the meetings of the block, which all ranks of `groups` enter and leave at the same point."""
    recorder = _Recorder(groups)
    kinds = {name for name in (*_MESSAGES, *_COLLECTIVES) if name in dir(dist.ProcessGroup)}
    before = {name: vars(dist.ProcessGroup)[name] for name in kinds}
    wait = Work.wait
    try:
        for name, call in before.items():
            setattr(dist.ProcessGroup, name, recorder.issue(name, call))
        Work.wait = recorder.wait(wait)  # type: ignore[method-assign]
        yield recorder.record
    finally:
        Work.wait = wait  # type: ignore[method-assign]
        for name, call in before.items():
            setattr(dist.ProcessGroup, name, call)


class _Recorder:
    def __init__(self, groups: ProcessGroups) -> None:
        self.record = Record()
        self._row_of = rows_of_groups(groups)
        self._numbers: dict[str, int] = {}
        self._pending: dict[int, tuple[Work, str]] = {}
        self._who: dict[str, str] = {}

    def issue(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The method `name` of a group, with its moment written down."""

        def issued(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            meeting = self._name(group, name, args)
            start = time.perf_counter()
            work = call(group, *args, **kwargs)
            row = self._row_of.get(group.group_name, "data")
            self.record.met.append(Met(meeting, row, name in _MESSAGES, start, time.perf_counter()))
            if work is not None:
                self._pending[id(work)] = work, meeting
            return work

        return issued

    def wait(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`Work.wait` with the time it took written down."""

        def waited(work: Work, *args: Any, **kwargs: Any) -> Any:
            known = self._pending.pop(id(work), None)
            start = time.perf_counter()
            result = call(work, *args, **kwargs)
            if known is not None:
                self.record.stood.append(Stood(known[1], start, time.perf_counter()))
            return result

        return waited

    def _name(self, group: dist.ProcessGroup, name: str, args: tuple[Any, ...]) -> str:
        name_of = group.group_name
        if name_of not in self._who:
            self._who[name_of] = f"{name_of} {dist.get_process_group_ranks(group)}"
        who = self._who[name_of]
        if name in _MESSAGES:
            me, peer = group.rank(), args[1]
            who += f" {me}>{peer}" if name == "send" else f" {peer}>{me}"
        number = self._numbers.get(who, 0)
        self._numbers[who] = number + 1
        return f"{who} #{number}"


def rows_of_groups(groups: ProcessGroups) -> dict[str, str]:
    """The ledger's row of each group, by name. Any other group joins gradients, norms and totals at the end of a step,
    and goes to `data`: DeepSpeed's own groups, tensor x pipeline, the world."""
    rows = {
        groups.data: "data",
        groups.expert_data: "data",
        groups.tensor: "tensor",
        groups.tensor_context: "tensor",
        groups.context: "context",
        groups.expert: "expert",
        groups.pipeline: "pipeline",
    }
    if groups.embedding is not None:
        rows[groups.embedding] = "pipeline"
    return {group.group_name: row for group, row in rows.items()}
