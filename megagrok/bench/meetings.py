"""Every collective and every message of this process, as it happens: when it was issued, and when the rank stood still.

Both libraries reach the network through torch.distributed, and torch.distributed through the methods of `ProcessGroup`
and `Work.wait`. There is no hook there, so `recorded` puts its own functions in their place, for a few steps of a
benchmark process and no longer. It changes neither what is sent nor when.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    """Everything since the recording began, in order; as little as can be done while it happens."""

    row_of_group: dict[str, str]
    calls: list[tuple[dist.ProcessGroup, str, int, float, float]] = field(default_factory=list)
    """Group, method, peer of a message (-1 of a collective), beginning and end of the call."""
    waits: list[tuple[int, float, float]] = field(default_factory=list)
    """Number of the call that is waited for, beginning and end."""
    pending: dict[int, tuple[Work, int]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what was recorded so far, none of which is still under way."""
        self.calls.clear()
        self.waits.clear()
        self.pending.clear()

    def meetings(self) -> list[Met]:
        """The calls, each with a name for its meeting."""
        met, numbers = [], Counter[str]()
        for group, name, peer, issued, issued_end in self.calls:
            who = f"{group.group_name} {dist.get_process_group_ranks(group)}"
            if name in _MESSAGES:
                me = group.rank()
                who += f" {me}>{peer}" if name == "send" else f" {peer}>{me}"
            numbers[who] += 1
            row = self.row_of_group.get(group.group_name, "data")
            met.append(Met(f"{who} #{numbers[who]}", row, issued, issued_end))
        return met

    def stays(self, met: Sequence[Met]) -> list[Stood]:
        """The waits. `met` is what `meetings` returned."""
        return [Stood(met[number].meeting, start, end) for number, start, end in self.waits]


@contextmanager
def recorded(groups: ProcessGroups) -> Iterator[Record]:
    """Record the meetings of the block, which all ranks of `groups` enter and leave at the same point."""
    record = Record(rows_of_groups(groups))
    kinds = {name for name in (*_MESSAGES, *_COLLECTIVES) if name in dir(dist.ProcessGroup)}
    before = {name: vars(dist.ProcessGroup)[name] for name in kinds}
    wait = Work.wait
    try:
        for name, call in before.items():
            setattr(dist.ProcessGroup, name, _issue(record, name, call))
        Work.wait = _wait(record, wait)  # type: ignore[method-assign]
        yield record
    finally:
        Work.wait = wait  # type: ignore[method-assign]
        for name, call in before.items():
            setattr(dist.ProcessGroup, name, call)


def _issue(record: Record, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The method `name` of a group, with its moment written down."""
    is_message = name in _MESSAGES

    def issued(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        work = call(group, *args, **kwargs)
        if work is not None:
            record.pending[id(work)] = work, len(record.calls)
        record.calls.append((group, name, args[1] if is_message else -1, start, time.perf_counter()))
        return work

    return issued


def _wait(record: Record, call: Callable[..., Any]) -> Callable[..., Any]:
    """`Work.wait`, with the time it took written down."""

    def waited(work: Work, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(work, *args, **kwargs)
        end = time.perf_counter()
        known = record.pending.pop(id(work), None)
        if known is not None:
            record.waits.append((known[1], start, end))
        return result

    return waited


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
