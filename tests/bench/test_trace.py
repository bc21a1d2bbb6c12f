"""Which row an instant belongs to: the innermost operation decides, whatever is recomputed counts as that."""

import pytest

from megagrok.bench.trace import Operation, attribute


def seconds(*operations: Operation, end: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for opened, closed, row, _ in attribute(operations, 0.0, end):
        found[row] = found.get(row, 0.0) + closed - opened
    return found


def test_the_innermost_operation_decides_and_the_rest_is_host() -> None:
    assert seconds(
        Operation("aten::linear", 1.0, 4.0),
        Operation("aten::t", 1.0, 1.5),
        Operation("aten::mm", 2.0, 4.0),
        Operation("aten::softmax", 5.0, 7.0),
        Operation("aten::bmm", 7.0, 8.0),
        end=10.0,
    ) == {"host": 5.0, "matmul": 2.0, "memory_bound": 2.0, "attention": 1.0}


def test_kernels_inside_a_checkpoint_are_recomputed_until_its_own_backward_pass_begins() -> None:
    node = "autograd::engine::evaluate_function: "
    assert seconds(
        Operation(node + "CheckpointFunctionBackward", 0.0, 9.0),
        Operation("CheckpointFunctionBackward", 0.0, 9.0),
        Operation("aten::mm", 1.0, 3.0),
        Operation(node + "MmBackward0", 4.0, 8.0),
        Operation("MmBackward0", 4.0, 8.0),
        Operation("aten::mm", 5.0, 8.0),
        Operation("aten::mm", 9.0, 10.0),
        end=10.0,
    ) == {"host": 4.0, "recompute": 2.0, "matmul": 4.0}


def test_every_operation_is_counted_where_its_cost_falls() -> None:
    pieces = list(attribute([Operation("aten::add", 1.0, 2.0), Operation("aten::add", 1.0, 2.0)], 0.0, 3.0))
    assert sum(events for *_, events in pieces) == 2
    assert pieces[0] == (0.0, 1.0, "host", 1)
    assert pieces[-1][1] == pytest.approx(3.0)
