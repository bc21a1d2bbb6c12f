"""Boxes and flat ranges, against a dense array in which every element is counted."""

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.checkpoint.geometry import Box, Piece, boxes_of_range, cover_problem, intersect, slices

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    begin = draw(st.integers(0, prod(shape)))
    return shape, begin, draw(st.integers(begin, prod(shape)))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(start, tuple(draw(st.integers(1, n - s)) for s, n in zip(start, shape, strict=True)))


@st.composite
def pieces_of_a_tensor(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Piece]]:
    """Arbitrary pieces, mostly no cover; those that are come from the cuts of the whole that are drawn beside them."""
    shape = draw(shapes)
    pieces = []
    for _ in range(draw(st.integers(0, 2))):
        box = draw(boxes_in(shape))
        begin = draw(st.integers(0, box.size))
        pieces.append(Piece(box, begin, draw(st.integers(begin, box.size))))
    whole = Box((0,) * len(shape), shape)
    cuts = sorted({0, whole.size, *draw(st.lists(st.integers(0, whole.size), max_size=3))})
    cut = [Piece(whole, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    if draw(st.booleans()):
        cut.pop(draw(st.integers(0, len(cut) - 1)))
    return shape, draw(st.permutations(pieces + cut))


@given(ranges())
@settings(max_examples=250, deadline=None)
def test_the_boxes_of_a_flat_range_are_its_elements_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = case
    dense = torch.arange(prod(shape)).view(shape)
    boxes = boxes_of_range(shape, begin, end)
    elements = [dense[slices(box, (0,) * len(shape))].reshape(-1) for box in boxes]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *elements]), torch.arange(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.size > 0 for box in boxes)


@given(pieces_of_a_tensor())
@settings(max_examples=250, deadline=None)
def test_a_cover_holds_each_element_exactly_once(case: tuple[tuple[int, ...], list[Piece]]) -> None:
    shape, pieces = case
    held = torch.zeros(shape, dtype=torch.int64)
    for piece in pieces:
        view = held[slices(piece.box, (0,) * len(shape))]
        view += ((torch.arange(view.numel()) >= piece.begin) & (torch.arange(view.numel()) < piece.end)).view(
            view.shape
        )
    problem = cover_problem(shape, pieces)
    assert (problem is None) == bool((held == 1).all())
    if problem is not None:
        assert ("held twice" in problem) == bool((held > 1).any())


@given(st.data(), shapes)
@settings(max_examples=200, deadline=None)
def test_the_intersection_is_the_elements_in_both_boxes(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    marks = torch.zeros(shape, dtype=torch.int64)
    for box in (a, b):
        marks[slices(box, (0,) * len(shape))] += 1
    shared = intersect(a, b)
    assert (shared.size if shared else 0) == int((marks == 2).sum())
    if shared:
        assert bool((marks[slices(shared, (0,) * len(shape))] == 2).all())


def test_a_tensor_without_elements_is_covered_by_nothing() -> None:
    assert cover_problem((0, 4), []) is None
    assert cover_problem((0, 4), [Piece(Box((0, 0), (0, 4)), 0, 0)]) is None
