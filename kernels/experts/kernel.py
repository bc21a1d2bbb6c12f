"""The experts in Triton: four kernels around ragged groups, so that no permuted x, no activation pass and no dH pass
besides the matmuls ever runs.

    forward    H, a = gate_up(x gathered)     the prologue gathers rows of x, the epilogue makes a = weight gelu(g) u
               y = rows_times(a, down)         contiguous rows; permute's gather-and-sum adds a token's rows up
    backward   dH, a, dweight = down_gradient(dout gathered)        the epilogue holds the derivative of the gated GELU
               dx rows = rows_times(dH, gate_up), gathered and summed likewise
               ddown = outer(dout gathered, a)     dgate_up = outer(dH, x gathered)      one expert's rows per program

A program computes one tile of one expert: the host knows the rows per expert and lists the tiles that exist, so none is
launched for nothing. No atomics: what several programs have for one row (dweight) goes to a column each, summed after.
The weight gradients are accumulated in fp32 in registers, and rounded once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# N rows of x, R rows (one per choice of a token), e experts of this rank, D hidden, F expert width, M tiles of rows

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.experts.door import check_shapes
from megagrok.kernels.permute.kernel import gather_and_sum
from megagrok.kernels.permute.torch_ops import rows_of_tokens

_GROUP_M: tl.constexpr = tl.constexpr(8)
"""Tiles of rows that share a column of weights before the next column comes: both then lie in the L2 cache."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of x by tiles that do not cross experts, on the device; and sizes for the matmuls."""

    expert_M: Tensor
    start_M: Tensor
    stop_M: Tensor
    """Row after the last of the tile's expert, not of the tile."""
    starts_e: Tensor
    """First row of each expert, and R; [e + 1]."""
    rows: int
    columns: int
    """Of a matmul with one accumulator."""
    depth: int

    @classmethod
    def of(cls, rows_per_expert: list[int], hidden: int, width: int, x_ND: Tensor) -> "Tiles":
        """One copy to the device, of a few numbers for each tile."""
        used = sum(rows > 0 for rows in rows_per_expert)
        # A tile of an expert with few rows would be mostly mask.
        mean = sum(rows_per_expert) // max(used, 1)
        rows = min(max(int(triton.next_power_of_2(max(mean, 1))), 16), 128)
        narrowest = int(triton.next_power_of_2(max(min(hidden, width), 16)))
        tiles, starts = [], [0]
        for expert, count in enumerate(rows_per_expert):
            start, stop = starts[-1], starts[-1] + count
            tiles += [(expert, first, stop) for first in range(start, stop, rows)]
            starts.append(stop)
        flat = [tile[field] for field in range(3) for tile in tiles]
        on_device = torch.tensor(flat + starts, dtype=torch.int32).to(x_ND.device, non_blocking=True)
        expert_M, start_M, stop_M, starts_e = torch.split(on_device, [len(tiles)] * 3 + [len(starts)])
        depth = 64 if x_ND.element_size() == 2 else 32
        # 256 columns are 128 fp32 registers of each of 8 warps' threads; fp32 operands would need the rest.
        widest = 256 if rows == 128 and x_ND.element_size() == 2 else 128
        return cls(expert_M, start_M, stop_M, starts_e, rows, min(narrowest, widest), min(narrowest, depth))


def mix_experts(
    x_ND: Tensor,
    source_R: Tensor,
    weight_R: Tensor,
    rows_per_expert: list[int],
    gate_up_eFD: Tensor,
    down_eDF: Tensor,
) -> Tensor:
    """`megagrok.kernels.experts.Experts`, in fp32, bf16 and fp16. Needs every row of x equally often in source_R."""
    check_shapes(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)
    if x_ND.dtype not in _DTYPES:
        raise KernelError(f"experts take fp32, bf16 and fp16 in Triton, got {x_ND.dtype}. Fix: kernels.experts=torch.")
    if len(source_R) % max(len(x_ND), 1):
        raise KernelError(
            f"experts: {len(source_R)} rows of {len(x_ND)} rows of x; in Triton each of them has to appear equally "
            "often. Fix: kernels.experts=torch."
        )
    return _mixed(x_ND, source_R, weight_R, rows_per_expert, gate_up_eFD, down_eDF)


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
        x_ND, source_R, weight_R = x_ND.contiguous(), source_R.contiguous(), weight_R.contiguous()
        gate_up_eFD, down_eDF = gate_up_eFD.contiguous(), down_eDF.contiguous()
        _, hidden, width = down_eDF.shape
        tiles = Tiles.of(rows_per_expert, hidden, width, x_ND)
        H_RF, a_RF = x_ND.new_empty(len(source_R), 2 * width), x_ND.new_empty(len(source_R), width)
        columns = _columns_of_epilogue(tiles)
        _launch(
            _gate_up, tiles, width, columns, x_ND, source_R, weight_R, gate_up_eFD, H_RF, a_RF, hidden, width,
            BLOCK_F=columns, BLOCK_K=tiles.depth,
        )  # fmt: skip
        y_RD = _rows_times(a_RF, down_eDF.transpose(1, 2), tiles)
        ctx.save_for_backward(x_ND, source_R, weight_R, gate_up_eFD, down_eDF, H_RF)
        ctx.tiles = tiles
        return gather_and_sum(y_RD, rows_of_tokens(source_R, len(x_ND)), None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, source_R, weight_R, gate_up_eFD, down_eDF, H_RF = ctx.saved_tensors
        tiles, dout_ND, (_, hidden, width) = ctx.tiles, grads[0].contiguous(), down_eDF.shape
        columns = _columns_of_epilogue(tiles)
        a_RF, dH_RF = H_RF.new_empty(len(H_RF), width), torch.empty_like(H_RF)
        dweight_RC = weight_R.new_empty(len(H_RF), triton.cdiv(width, columns), dtype=torch.float32)
        _launch(
            _down_gradient, tiles, width, columns, dout_ND, source_R, weight_R, down_eDF, H_RF, a_RF, dH_RF, dweight_RC,
            hidden, width, BLOCK_F=columns, BLOCK_K=tiles.depth,
        )  # fmt: skip
        ddown_eDF = _outer(dout_ND, a_RF, source_R, True, tiles, down_eDF)
        del a_RF
        dgate_up_eFD = _outer(dH_RF, x_ND, source_R, False, tiles, gate_up_eFD)
        dx_RD = _rows_times(dH_RF, gate_up_eFD, tiles)
        dx_ND = gather_and_sum(dx_RD, rows_of_tokens(source_R, len(x_ND)), None)
        return dx_ND, None, dweight_RC.sum(1).to(weight_R.dtype), None, dgate_up_eFD, ddown_eDF


_mixed: Callable[..., Tensor] = _MixExperts.apply


def _columns_of_epilogue(tiles: Tiles) -> int:
    """Of the two kernels with the GELU in them: two accumulators, or the derivative's operands, share the registers.

    Compiled for an H100, 64 columns of 128 rows need no memory for spilled registers, and 128 do.
    """
    return min(max(tiles.columns // 2, 16), 64)


def _launch(kernel: Any, tiles: Tiles, num_columns: int, columns: int, *arguments: Any, **blocks: int) -> None:
    """One program for each tile of rows and block of columns."""
    blocks_of_columns = triton.cdiv(num_columns, columns)
    if len(tiles.expert_M) == 0:
        return
    grid = (len(tiles.expert_M) * blocks_of_columns,)
    schedule = (tiles.expert_M, tiles.start_M, tiles.stop_M, len(tiles.expert_M), blocks_of_columns)
    kernel[grid](*schedule, *arguments, BLOCK_R=tiles.rows, **blocks, num_warps=8 if tiles.rows == 128 else 4)


def _rows_times(rows_RK: Tensor, weight_eKN: Tensor, tiles: Tiles) -> Tensor:
    """Rows of each expert times its weight of any strides, [R, N]."""
    _, depth, num_columns = weight_eKN.shape
    out_RN = rows_RK.new_empty(len(rows_RK), num_columns)
    _launch(
        _rows_times_weight, tiles, num_columns, tiles.columns, rows_RK, weight_eKN, out_RN, depth, num_columns,
        *weight_eKN.stride(), BLOCK_N=tiles.columns, BLOCK_K=tiles.depth,
    )  # fmt: skip
    return out_RN


def _outer(left: Tensor, right: Tensor, source_R: Tensor, gathers_left: bool, tiles: Tiles, like: Tensor) -> Tensor:
    """Of each expert left^T right over its rows, as `like`; one of the two is gathered. Zero for experts without."""
    num_experts, left_width, right_width = like.shape
    gradient = torch.empty_like(like)
    left_block, right_block = min(tiles.columns, 128), tiles.columns
    grid = (triton.cdiv(left_width, left_block) * triton.cdiv(right_width, right_block), num_experts)
    _outer_of_rows[grid](
        tiles.starts_e, left, right, source_R, gradient, left_width, right_width,
        GATHERS_LEFT=gathers_left, BLOCK_M=left_block, BLOCK_N=right_block, BLOCK_K=tiles.depth,
        num_warps=8 if left_block == 128 else 4,
    )  # fmt: skip
    return gradient


@triton.jit
def _tile_of_program(expert_M, start_M, stop_M, M, num_columns, BLOCK_R: tl.constexpr):
    """Expert, rows, which of them are the expert's, and block of columns of this program; neighbours share weights."""
    program = tl.program_id(0)
    per_group = _GROUP_M * num_columns
    first = program // per_group * _GROUP_M
    size = min(M - first, _GROUP_M)
    tile = first + program % per_group % size
    column = program % per_group // size
    rows = tl.load(start_M + tile).to(tl.int64) + tl.arange(0, BLOCK_R)
    return tl.load(expert_M + tile).to(tl.int64), rows, rows < tl.load(stop_M + tile), column


@triton.jit
def _gelu_parts(gate):
    """gelu_tanh(gate) and its derivative: gate s(z), z = 2k (gate + c gate^3), s the logistic function."""
    square = gate * gate
    s = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
    gelu = gate * s
    return gelu, s + gelu * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def _gate_up(
    expert_M, start_M, stop_M, M, num_columns, x_ND, source_R, weight_R, gate_up_eFD, H_RF, a_RF, D, F,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, rows, in_R, column = _tile_of_program(expert_M, start_M, stop_M, M, num_columns, BLOCK_R)
    f = column * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    in_F = f < F
    x_at = x_ND + tl.load(source_R + rows, mask=in_R, other=0)[:, None] * D + k[None, :]
    gate_at = gate_up_eFD + (expert * 2 * F + f)[None, :] * D + k[:, None]
    up_at = gate_up_eFD + (expert * 2 * F + F + f)[None, :] * D + k[:, None]
    gate = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_D = start + k < D
        x = tl.load(x_at + start, mask=in_R[:, None] & in_D[None, :], other=0.0)
        in_DF = in_D[:, None] & in_F[None, :]
        gate = tl.dot(x, tl.load(gate_at + start, mask=in_DF, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(up_at + start, mask=in_DF, other=0.0), up, input_precision="ieee")
    in_RF = in_R[:, None] & in_F[None, :]
    H_at = H_RF + rows[:, None] * (2 * F) + f[None, :]
    tl.store(H_at, gate.to(H_RF.dtype.element_ty), mask=in_RF)
    tl.store(H_at + F, up.to(H_RF.dtype.element_ty), mask=in_RF)
    gelu, _ = _gelu_parts(gate)
    a = gelu * up * tl.load(weight_R + rows, mask=in_R, other=0.0)[:, None]
    tl.store(a_RF + rows[:, None] * F + f[None, :], a.to(a_RF.dtype.element_ty), mask=in_RF)


@triton.jit
def _down_gradient(
    expert_M, start_M, stop_M, M, num_columns, dout_ND, source_R, weight_R, down_eDF, H_RF, a_RF, dH_RF, dweight_RC,
    D, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, rows, in_R, column = _tile_of_program(expert_M, start_M, stop_M, M, num_columns, BLOCK_R)
    f = column * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    in_F = f < F
    dout_at = dout_ND + tl.load(source_R + rows, mask=in_R, other=0)[:, None] * D + k[None, :]
    down_at = down_eDF + (expert * D + k)[:, None] * F + f[None, :]
    da = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_D = start + k < D
        dout = tl.load(dout_at + start, mask=in_R[:, None] & in_D[None, :], other=0.0)
        down = tl.load(down_at, mask=in_D[:, None] & in_F[None, :], other=0.0)
        da = tl.dot(dout, down, da, input_precision="ieee")
        down_at += BLOCK_K * F
    in_RF = in_R[:, None] & in_F[None, :]
    H_at = rows[:, None] * (2 * F) + f[None, :]
    gate = tl.load(H_RF + H_at, mask=in_RF, other=0.0).to(tl.float32)
    up = tl.load(H_RF + H_at + F, mask=in_RF, other=0.0).to(tl.float32)
    gelu, slope = _gelu_parts(gate)
    weight = tl.load(weight_R + rows, mask=in_R, other=0.0)[:, None]
    a = gelu * up
    tl.store(dweight_RC + rows * num_columns + column, tl.sum(da * a, axis=1), mask=in_R)
    tl.store(a_RF + rows[:, None] * F + f[None, :], (a * weight).to(a_RF.dtype.element_ty), mask=in_RF)
    da *= weight
    tl.store(dH_RF + H_at, (da * up * slope).to(dH_RF.dtype.element_ty), mask=in_RF)
    tl.store(dH_RF + H_at + F, (da * gelu).to(dH_RF.dtype.element_ty), mask=in_RF)


@triton.jit
def _rows_times_weight(
    expert_M, start_M, stop_M, M, num_columns, rows_RK, weight_eKN, out_RN, K, N, stride_e, stride_k, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, rows, in_R, column = _tile_of_program(expert_M, start_M, stop_M, M, num_columns, BLOCK_R)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_N = n < N
    rows_at = rows_RK + rows[:, None] * K + k[None, :]
    weight_at = weight_eKN + expert * stride_e + k[:, None] * stride_k + n[None, :] * stride_n
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_K = start + k < K
        left = tl.load(rows_at, mask=in_R[:, None] & in_K[None, :], other=0.0)
        total = tl.dot(
            left,
            tl.load(weight_at, mask=in_K[:, None] & in_N[None, :], other=0.0),
            total,
            input_precision="ieee",
        )
        rows_at += BLOCK_K
        weight_at += BLOCK_K * stride_k
    out_at = out_RN + rows[:, None] * N + n[None, :]
    tl.store(out_at, total.to(out_RN.dtype.element_ty), mask=in_R[:, None] & in_N[None, :])


@triton.jit
def _outer_of_rows(
    starts_e, left, right, source_R, gradient, M, N,
    GATHERS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_of_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) // blocks_of_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) % blocks_of_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_M, in_N = m < M, n < N
    stop = tl.load(starts_e + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(starts_e + expert), stop, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K).to(tl.int64)
        in_R = rows < stop
        sources = tl.load(source_R + rows, mask=in_R, other=0)
        left_rows = sources if GATHERS_LEFT else rows
        right_rows = rows if GATHERS_LEFT else sources
        # Loaded as it lies, row by row, and transposed on the chip.
        left_KM = tl.load(left + left_rows[:, None] * M + m[None, :], mask=in_R[:, None] & in_M[None, :], other=0.0)
        right_KN = tl.load(right + right_rows[:, None] * N + n[None, :], mask=in_R[:, None] & in_N[None, :], other=0.0)
        total = tl.dot(tl.trans(left_KM), right_KN, total, input_precision="ieee")
    at_MN = (expert * M + m)[:, None] * N + n[None, :]
    tl.store(gradient + at_MN, total.to(gradient.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])
