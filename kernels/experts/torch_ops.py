"""The experts as torch matmuls on borrowed memory: the fast implementation on a CPU.

A run is up to 1,536 rows: part of one expert's, or all those of some experts, whose matmuls are then all that is done
for each alone. Its gathered x, its activations and its results live in scratch memory that the next run overwrites, so
they stay in the cache and no fresh page is ever touched for them: on a CPU the first touch of a page costs more than
the arithmetic done on it. Only the pre-activations H are kept, a tensor for each run: the allocator hands memory of
that size out again, but returns a tensor of 32 MiB to the system, page by page.

    forward, per run      x = x_ND[source]    H = x gate_up^T    a = gelu(g) u weight    out[source] += a down^T
    backward, per run     dy = dout[source]   da = dy down       dweight = <da, gelu(g) u>
                          dH = ...            ddown += dy^T a    dgate_up += dH^T x      dx[source] += dH gate_up

A token's results are added in the order of its experts. On a GPU, where additions that meet come in any order, a run is
one expert's, which a token visits at most once.
"""

# N rows of x, R rows (one per choice of a token), r rows of a run, e experts of this rank, D hidden, F expert width

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagrok.kernels.experts.activation import gated_gelu, gated_gelu_gradients
from megagrok.kernels.experts.door import check_shapes

CPU_RUN_ROWS = 1536
"""Most rows of a run on a CPU: shorter runs cost the matmuls their rate, longer ones find the cache gone."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a run that go to one expert."""

    expert: int
    rows: slice
    """Of the run."""
    is_first: bool
    """Of its expert: it overwrites the weights' gradient, the others add to it."""


@dataclass(frozen=True, slots=True)
class Run:
    start: int
    stop: int
    parts: list[Part]


def mix_experts(
    x_ND: Tensor,
    source_R: Tensor,
    weight_R: Tensor,
    rows_per_expert: list[int],
    gate_up_eFD: Tensor,
    down_eDF: Tensor,
) -> Tensor:
    """`megagrok.kernels.experts.Experts`, on any device and in any dtype that torch multiplies there."""
    check_shapes(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)
    return _mixed(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)


def _runs(rows_per_expert: list[int], most: int, *, joins: bool) -> Iterator[Run]:
    """Every row once, in order; the runs of a split expert are of equal size, but for rounding."""
    start = stop = 0
    parts: list[Part] = []
    for expert, rows in enumerate(rows_per_expert):
        if parts and (not joins or stop - start + rows > most):
            yield Run(start, stop, parts)
            start, parts = stop, []
        num_runs = -(-rows // most)
        for number in range(num_runs):
            if number:
                yield Run(start, stop, parts)
                start, parts = stop, []
            length = (number + 1) * rows // num_runs - number * rows // num_runs
            parts.append(Part(expert, slice(stop - start, stop - start + length), number == 0))
            stop += length
    if parts:
        yield Run(start, stop, parts)


def _most_rows(x_ND: Tensor, rows_per_expert: list[int]) -> int:
    """Rows of the longest run. A GPU is best with all of an expert's at once."""
    is_cpu = x_ND.device.type == "cpu"
    return max(1, min(sum(rows_per_expert), CPU_RUN_ROWS) if is_cpu else max(rows_per_expert, default=0))


class _MixExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        source_R: Tensor,
        weight_R: Tensor,
        rows_per_expert: list[int],
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        hidden, width = x_ND.shape[1], down_eDF.shape[2]
        most = _most_rows(x_ND, rows_per_expert)
        H_rF = []
        sum_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        x_rD, a_rF, y_rD = x_ND.new_empty(most, hidden), x_ND.new_empty(most, width), x_ND.new_empty(most, hidden)
        for run in _runs(rows_per_expert, most, joins=x_ND.device.type == "cpu"):
            rows, length = slice(run.start, run.stop), run.stop - run.start
            x, a, y = x_rD[:length], a_rF[:length], y_rD[:length]
            H = x_ND.new_empty(length, 2 * width)
            torch.index_select(x_ND, 0, source_R[rows], out=x)
            for part in run.parts:
                torch.mm(x[part.rows], gate_up_eFD[part.expert].t(), out=H[part.rows])
            H_rF.append(H)
            gated_gelu(H, weight_R[rows, None], a)
            for part in run.parts:
                torch.mm(a[part.rows], down_eDF[part.expert].t(), out=y[part.rows])
            sum_ND.index_add_(0, source_R[rows], y.to(sum_ND.dtype))
        ctx.save_for_backward(x_ND, source_R, weight_R, gate_up_eFD, down_eDF, *H_rF)
        ctx.rows_per_expert = rows_per_expert
        return sum_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout_ND = grads[0].contiguous()
        x_ND, source_R, weight_R, gate_up_eFD, down_eDF, *H_rF = ctx.saved_tensors
        hidden, width = x_ND.shape[1], down_eDF.shape[2]
        most = _most_rows(x_ND, ctx.rows_per_expert)
        sum_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        dweight_R = torch.empty_like(weight_R)
        dgate_up_eFD, ddown_eDF = torch.empty_like(gate_up_eFD), torch.empty_like(down_eDF)
        x_rD, dy_rD, dx_rD = (x_ND.new_empty(most, hidden) for _ in range(3))
        da_rF, a_rF, scratch_rF = (x_ND.new_empty(most, width) for _ in range(3))
        dH_rF = x_ND.new_empty(most, 2 * width)
        for expert, count in enumerate(ctx.rows_per_expert):
            if count == 0:
                dgate_up_eFD[expert].zero_()
                ddown_eDF[expert].zero_()
        runs = _runs(ctx.rows_per_expert, most, joins=x_ND.device.type == "cpu")
        for run, H in zip(runs, H_rF, strict=True):
            rows, length = slice(run.start, run.stop), run.stop - run.start
            x, dy, dx = x_rD[:length], dy_rD[:length], dx_rD[:length]
            da, a, dH = da_rF[:length], a_rF[:length], dH_rF[:length]
            torch.index_select(dout_ND, 0, source_R[rows], out=dy)
            torch.index_select(x_ND, 0, source_R[rows], out=x)
            for part in run.parts:
                torch.mm(dy[part.rows], down_eDF[part.expert], out=da[part.rows])
            dweight_R[rows] = gated_gelu_gradients(H, weight_R[rows, None], da, a, dH, scratch_rF[:length])
            for part in run.parts:
                ddown_DF, dgate_up_FD = ddown_eDF[part.expert], dgate_up_eFD[part.expert]
                beta = 0 if part.is_first else 1
                torch.addmm(ddown_DF, dy[part.rows].t(), a[part.rows], beta=beta, out=ddown_DF)
                torch.addmm(dgate_up_FD, dH[part.rows].t(), x[part.rows], beta=beta, out=dgate_up_FD)
                torch.mm(dH[part.rows], gate_up_eFD[part.expert], out=dx[part.rows])
            sum_ND.index_add_(0, source_R[rows], dx.to(sum_ND.dtype))
        return sum_ND.to(x_ND.dtype), None, dweight_R, None, dgate_up_eFD, ddown_eDF


_mixed: Callable[..., Tensor] = _MixExperts.apply
