"""First values of the parameters: any block of any tensor, the same numbers whoever asks. No ranks, no global state.

A value depends on (seed, name, position in the global tensor) and on nothing else, so the oracle and every layout
start from identical weights, and a rank draws only what it holds. Rows are drawn in fixed chunks; each chunk has a
counter-based stream of its own, and a block reads the chunks that it overlaps.

The law (megagrok's own; xAI's training recipe is unpublished): norm gains are 1, every matrix is normal with mean 0
and standard deviation init_std, projections back into the residual stream init_std / sqrt(2 * num_layers) (GPT-2,
Radford et al. 2019, sec. 2.3: 2 * num_layers sub-blocks add to the stream).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from megagrok.config.schema import ModelConfig
from megagrok.errors import ShapeError
from megagrok.model.names import is_norm, is_residual_projection, parameter_shapes

CHUNK_ROWS = 1024
"""Rows that share a stream. Part of the law: another number gives other weights."""


def initial_value(
    name: str,
    model: ModelConfig,
    seed: int,
    *,
    start: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The block [start, start + shape) of the global tensor `name`, on CPU; without start and shape the whole tensor.

    Drawn in fp32 and rounded to `dtype` last, so all dtypes agree. Besides the block, a call holds one chunk of
    CHUNK_ROWS whole rows. Raises ShapeError if the name is not the model's or the block leaves the tensor.
    """
    global_shape = parameter_shapes(model).get(name)
    if global_shape is None:
        raise ShapeError(f"{name} is not a parameter of this model; megagrok.model.names lists those that are.")
    start = start if start is not None else (0,) * len(global_shape)
    shape = shape if shape is not None else tuple(size - low for low, size in zip(start, global_shape, strict=True))
    _check_block(name, global_shape, start, shape)
    if is_norm(name):
        return torch.ones(shape, dtype=dtype)
    block = torch.empty(shape, dtype=dtype)
    std = initial_std(name, model)
    (first_row, first_column), (num_rows, num_columns) = start, shape
    end_row = first_row + num_rows
    for chunk in range(first_row // CHUNK_ROWS, math.ceil(end_row / CHUNK_ROWS)):
        chunk_row = chunk * CHUNK_ROWS
        low, high = max(first_row, chunk_row), min(end_row, chunk_row + CHUNK_ROWS)
        rows = _draw_chunk(name, seed, chunk, (min(CHUNK_ROWS, global_shape[0] - chunk_row), global_shape[1]))
        columns = rows[low - chunk_row : high - chunk_row, first_column : first_column + num_columns]
        block[low - first_row : high - first_row] = columns * std
    return block


def initial_std(name: str, model: ModelConfig) -> float:
    """Standard deviation of the first values of the matrix `name`."""
    return model.init_std / math.sqrt(2 * model.num_layers) if is_residual_projection(name) else model.init_std


def _draw_chunk(name: str, seed: int, chunk: int, shape: tuple[int, int]) -> Tensor:
    """Standard normal values of one chunk.

    Philox takes the whole 128-bit key. torch's CPU generator keeps 32 bits of its seed: among the tens of thousands of
    chunks of a 286B model, two would start with the same numbers in about one run of six.
    """
    key = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=16).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))


def _check_block(name: str, global_shape: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    is_inside = len(start) == len(shape) == len(global_shape) and all(
        0 <= low <= low + extent <= size for low, extent, size in zip(start, shape, global_shape, strict=True)
    )
    if not is_inside:
        raise ShapeError(
            f"{name} has shape {list(global_shape)}; the block at {list(start)} of {list(shape)} leaves it."
        )
