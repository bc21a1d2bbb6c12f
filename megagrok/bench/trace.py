"""One step under torch's profiler, as a timeline: which row each operation of this rank's thread belongs to.

The profiler writes down every operation with its beginning and end, backward pass included, in less than a microsecond
each. An instant belongs to the innermost operation of that moment. What is no kernel is `host`: Python,
autograd's book-keeping, views, allocation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile, record_function

from megagrok.bench.ledger import Arrival, Blocked, Item, Timeline, Work
from megagrok.bench.meetings import Met, Record, Stood, recorded
from megagrok.parallel.groups import ProcessGroups
from megagrok.parallel.ranks import Ranks

MATMUL = frozenset({"aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::mv", "aten::addmv", "aten::dot"})
# Grok's attention is batched products of scores and values; nothing else of the model is batched.
ATTENTION = frozenset({"aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu"})
# They give another view of memory, ask something, or hand on to the operation that does the work.
_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "chunk", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand",
        "expand_as", "flatten", "is_nonzero", "item", "linear", "matmul", "narrow", "new_empty", "new_empty_strided",
        "numpy_T", "permute", "reshape", "resize_", "resolve_conj", "resolve_neg", "result_type", "select", "slice",
        "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "type_as", "unbind", "unflatten",
        "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "view_as", "_local_scalar_dense", "_reshape_alias",
        "_unsafe_view", "_has_compatible_shallow_copy_type", "set_", "lift_fresh", "_to_copy", "contiguous",
        "clone", "zeros",
    )
)  # fmt: skip
_CLOCK = "megagrok clock"
# Megatron runs a checkpointed part again inside this node of the backward pass, then backward through it.
_RECOMPUTING = "CheckpointFunctionBackward"
_BACKWARD_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded operation, in seconds of time.perf_counter."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Sections:
    """Parts of the step that are one row whatever is computed in them, but for their communication."""

    found: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def during(self, row: str) -> Iterator[None]:
        """Everything in the block belongs to `row`."""
        start = time.perf_counter()
        yield
        self.found.append((row, start, time.perf_counter()))


def trace_step(step: Callable[[Sections], None], groups: ProcessGroups, ranks: Ranks) -> Timeline:
    """The timeline of one call of `step`, on this rank, all ranks beginning together. Collective."""
    sections = Sections()
    marks: list[float] = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler, recorded(groups) as record:
        _mark(marks)
        ranks.barrier()
        record.clear()
        cpu, start = time.thread_time(), time.perf_counter()
        step(sections)
        cpu, end = time.thread_time() - cpu, time.perf_counter()
        _mark(marks)
    operations = _operations(profiler, marks)
    stage = groups.coordinates.pipeline
    return Timeline(stage, start, tuple(_timeline(operations, sections, record, start, end)), cpu)


def _mark(marks: list[float]) -> None:
    """Moments that both clocks know."""
    for _ in range(8):
        before = time.perf_counter()
        with record_function(_CLOCK):
            marks.append((before + time.perf_counter()) / 2)


def _operations(profiler: profile, marks: Sequence[float]) -> list[Operation]:
    """What the thread of the step did, on our clock."""
    events = profiler.events() or []  # type: ignore[no-untyped-call]
    clocks = sorted((event for event in events if event.name == _CLOCK), key=lambda event: event.time_range.start)
    assert len(clocks) == len(marks), f"{len(clocks)} of {len(marks)} marks recorded"
    # A mark may be late on our side (the rank was not running then), never early: the smallest difference is the truth.
    offset = min(mark - event.time_range.start * 1e-6 for mark, event in zip(marks, clocks, strict=True))
    thread = clocks[0].thread
    return [
        Operation(event.name, event.time_range.start * 1e-6 + offset, event.time_range.end * 1e-6 + offset)
        for event in events
        if event.thread == thread and event.name != _CLOCK and not event.is_async
    ]


def _timeline(
    operations: Sequence[Operation], sections: Sections, record: Record, start: float, end: float
) -> Iterator[Item]:
    """All of the step in order: work by row, arrivals, stays."""
    ribbon = _Ribbon(attribute(operations, start, end))
    met = record.meetings()
    edges: list[tuple[float, float, Met | Stood | str]] = [
        *((one.issued, one.issued_end, one) for one in met),
        *((one.start, one.end, one) for one in record.stays(met)),
        *((opened, opened, row) for row, opened, _ in sections.found),
        *((closed, closed, "") for _, _, closed in sections.found),
    ]
    section = ""
    for opened, closed, what in sorted(edges, key=lambda edge: edge[0]):
        yield from ribbon.work(opened, section)
        match what:
            case Met():
                yield Arrival(what.meeting, what.issued, what.row)
                yield from ribbon.work(closed, what.row)
            case Stood():
                ribbon.work(closed, "")
                yield Blocked(what.meeting, opened, closed - opened)
            case str():
                section = what
    yield from ribbon.work(end, section)


class _Ribbon:
    """Pieces of a step, to be taken off from the front."""

    def __init__(self, pieces: Iterator[tuple[float, float, str, int]]) -> None:
        self._pieces, self._rest = pieces, next(pieces)

    def work(self, until: float, section: str) -> list[Work]:
        """What lies before `until`, as one row if a section is named, neighbours of one row together."""
        found: list[Work] = []
        while True:
            opened, closed, row, events = self._rest
            is_whole = closed <= until
            cut = min(closed, until)
            if cut > opened or (is_whole and events):
                row = section or row
                last = found.pop() if found and found[-1].row == row else Work(row, 0.0)
                found.append(Work(row, last.seconds + cut - opened, last.events + (events if is_whole else 0)))
            if not is_whole:
                self._rest = cut, closed, self._rest[2], events
                return found
            following = next(self._pieces, None)
            if following is None:
                self._rest = closed, float("inf"), "host", 0
                return found
            self._rest = following


def attribute(operations: Sequence[Operation], start: float, end: float) -> Iterator[tuple[float, float, str, int]]:
    """Disjoint pieces (from, to, row, operations begun) that cover start to end; the innermost operation decides."""
    now = start
    stack: list[tuple[float, str, bool]] = [(end, "host", False)]

    def until(when: float, events: int) -> Iterator[tuple[float, float, str, int]]:
        nonlocal now
        while len(stack) > 1 and stack[-1][0] <= when:
            closing, row, _ = stack.pop()
            if closing > now:
                yield now, closing, row, 0
                now = closing
        when = max(when, now)
        if when > now or events:
            yield now, when, stack[-1][1], events
            now = when

    for operation in sorted(operations, key=lambda operation: (operation.start, -operation.end)):
        if operation.start < start or operation.end > end:
            continue
        yield from until(operation.start, 1)
        is_again = _is_again(operation.name, stack[-1][2])
        stack.append((min(operation.end, stack[-1][0]), _row(operation.name, is_again), is_again))
    yield from until(end, 0)


def _is_again(name: str, is_outer_again: bool) -> bool:
    """Whether operations inside `name` compute something for the second time."""
    if name.endswith(_RECOMPUTING) and not name.startswith(_BACKWARD_NODE):
        return True
    return is_outer_again and not name.startswith(_BACKWARD_NODE)


def _row(name: str, is_again: bool) -> str:
    if not name.startswith("aten::") or name in _NO_KERNEL:
        return "host"
    if is_again:
        return "recompute"
    return "matmul" if name in MATMUL else "attention" if name in ATTENTION else "memory_bound"
