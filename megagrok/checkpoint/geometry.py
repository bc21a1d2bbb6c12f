"""Boxes in a tensor and flat ranges of boxes: pure integer arithmetic, no torch, no files.

The one idea: a flat range of a C-ordered box is at most 2n - 1 smaller boxes, and each of these is contiguous in the
range. With that, any layout is a set of boxes, and reading one layout through another is nothing but intersections.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

Index = tuple[int, ...]


class Box(NamedTuple):
    """A rectangular part of a tensor: where it begins and how far it reaches, one number a dimension."""

    start: Index
    shape: Index

    @property
    def size(self) -> int:
        """Elements in the box; 1 for the box of a scalar."""
        return prod(self.shape)


class Piece(NamedTuple):
    """The elements begin..end of `box`, counted in C order inside the box."""

    box: Box
    begin: int
    end: int

    def boxes(self) -> list[Box]:
        """The piece as boxes of the whole tensor, in the order of its elements."""
        inner = boxes_of_range(self.box.shape, self.begin, self.end)
        return [Box(tuple(a + b for a, b in zip(self.box.start, box.start, strict=True)), box.shape) for box in inner]


def boxes_of_range(shape: Index, begin: int, end: int) -> list[Box]:
    """Cut the flat range begin..end of a C-ordered tensor of this shape into boxes, in flat order.

    Each box holds consecutive elements of the range, so the k-th box begins in the range where the sizes of the boxes
    before it end. An empty range has none; a range of n dimensions has at most 2n - 1.
    """
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    if first == last and end - begin < row:
        return _in_row(shape, first, begin, end)
    boxes = []
    if begin % row:
        boxes += _in_row(shape, first, begin, (first + 1) * row)
        first += 1
    full_rows = end // row - first
    if full_rows:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (full_rows, *shape[1:])))
    if end % row:
        boxes += _in_row(shape, last, last * row, end)
    return boxes


def _in_row(shape: Index, row: int, begin: int, end: int) -> list[Box]:
    """The boxes of a range that stays inside one row of the first dimension."""
    row_begin = row * prod(shape[1:])
    inner = boxes_of_range(shape[1:], begin - row_begin, end - row_begin)
    return [Box((row, *box.start), (1, *box.shape)) for box in inner]


def intersect(a: Box, b: Box) -> Box | None:
    """The box that lies in both, in the coordinates of both; None where they share no element."""
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    ends = (min(x + m, y + n) for x, m, y, n in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(end - begin for begin, end in zip(start, ends, strict=True))
    return Box(start, shape) if min(shape, default=1) > 0 else None


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """The index expression of `box` in an array whose first element stands at `origin`."""
    return tuple(slice(s - o, s - o + n) for s, n, o in zip(box.start, box.shape, origin, strict=True))


def cover_problem(shape: Index, pieces: Iterable[Piece]) -> str | None:
    """Why the pieces do not cover a tensor of this shape exactly once, or None if they do. They must lie inside it.

    Pieces of one box are joined first, so the usual case (a box cut over many ranks) costs a sort and the comparison
    of boxes with boxes sees one box a tensor-parallel rank.
    """
    ranges: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for piece in pieces:
        if piece.begin < piece.end:
            ranges[piece.box].append((piece.begin, piece.end))
    boxes = []
    for box, held in ranges.items():
        held.sort()
        joined = [held[0]]
        for begin, end in held[1:]:
            if begin == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        for begin, end in joined:
            boxes += Piece(box, begin, end).boxes()
    twice = _first_overlap(boxes)
    if twice:
        return f"the block {_show(twice)} is held twice"
    total, found = prod(shape), sum(box.size for box in boxes)
    return None if found == total else f"{total - found} of its {total} elements are missing"


def _first_overlap(boxes: list[Box]) -> Box | None:
    boxes = sorted(boxes)
    if boxes and not boxes[0].shape:
        return boxes[0] if len(boxes) > 1 else None
    if all(a.start[0] + a.shape[0] <= b.start[0] for a, b in pairwise(boxes)):
        return None
    for i, box in enumerate(boxes):
        end = box.start[0] + box.shape[0]
        for other in boxes[i + 1 :]:
            if other.start[0] >= end:
                break
            if shared := intersect(box, other):
                return shared
    return None


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{s}:{s + n}" for s, n in zip(box.start, box.shape, strict=True)) + "]"
