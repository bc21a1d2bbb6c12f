"""Laws of the first values: they depend on seed, name and position, and follow the documented distribution."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from megagrok.config.schema import ModelConfig, MoEConfig
from megagrok.errors import ShapeError
from megagrok.model.init import CHUNK_ROWS, initial_std, initial_value
from megagrok.model.names import is_norm, is_residual_projection, parameter_shapes

# The embedding crosses two chunk borders and ends within a chunk.
MODEL = ModelConfig(
    vocab_size=2 * CHUNK_ROWS + 77,
    hidden=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=40, residual_ffn_hidden=56),
)
EMBEDDING = "model.embed_tokens.weight"


def test_any_block_is_the_slice_of_the_whole() -> None:
    draw = random.Random(5)
    for name, global_shape in parameter_shapes(MODEL).items():
        whole = initial_value(name, MODEL, seed=1)
        assert tuple(whole.shape) == global_shape
        for _ in range(40 if name == EMBEDDING else 4):
            start = tuple(draw.randint(0, size) for size in global_shape)
            shape = tuple(draw.randint(0, size - low) for low, size in zip(start, global_shape, strict=True))
            window = tuple(slice(low, low + extent) for low, extent in zip(start, shape, strict=True))
            block = initial_value(name, MODEL, seed=1, start=start, shape=shape)
            assert torch.equal(block, whole[window]), (name, start, shape)


def test_a_block_without_shape_reaches_to_the_end() -> None:
    whole = initial_value(EMBEDDING, MODEL, seed=1)
    assert torch.equal(initial_value(EMBEDDING, MODEL, seed=1, start=(1500, 7)), whole[1500:, 7:])


def test_every_name_chunk_and_seed_has_numbers_of_its_own() -> None:
    rows = [
        initial_value(name, MODEL, seed, start=(row, 0), shape=(1, 24)) / initial_std(name, MODEL)
        for seed in (0, 1, 2**32, 2**63)
        for name, shape in parameter_shapes(MODEL).items()
        if not is_norm(name)
        for row in range(0, shape[0], CHUNK_ROWS)
    ]
    unique = {tuple(row.flatten().tolist()) for row in rows}
    assert len(unique) == len(rows)


def test_matrices_are_normal_with_the_documented_deviation() -> None:
    # 4.5 standard errors: a wrong sample mean or deviation of one of 60 matrices by chance is below 1 in 1000.
    sigmas = 4.5
    for name, shape in parameter_shapes(MODEL).items():
        if is_norm(name):
            continue
        documented = 0.02 / math.sqrt(6) if is_residual_projection(name) else 0.02
        value = initial_value(name, MODEL, seed=3).double()
        n = value.numel()
        assert n == math.prod(shape)
        assert abs(value.mean().item()) < sigmas * documented / math.sqrt(n), name
        assert abs(value.std().item() / documented - 1) < sigmas / math.sqrt(2 * n), name


def test_the_embedding_passes_a_test_of_normality() -> None:
    z = np.sort(initial_value(EMBEDDING, MODEL, seed=4).double().flatten().numpy() / 0.02)
    expected = 0.5 * (1 + torch.erf(torch.from_numpy(z / math.sqrt(2))).numpy())
    distance = np.abs(np.arange(len(z)) / len(z) - expected).max()
    # Kolmogorov-Smirnov: P(distance > 1.95 / sqrt(n)) is 1 in 1000.
    assert distance < 1.95 / math.sqrt(len(z))


def test_neighbouring_chunks_are_uncorrelated() -> None:
    value = initial_value(EMBEDDING, MODEL, seed=4).double() / 0.02
    first, second = value[:CHUNK_ROWS].flatten(), value[CHUNK_ROWS : 2 * CHUNK_ROWS].flatten()
    assert abs((first * second).mean().item()) < 4.5 / math.sqrt(len(first))


def test_norm_gains_are_ones() -> None:
    for name in filter(is_norm, parameter_shapes(MODEL)):
        assert torch.equal(initial_value(name, MODEL, seed=9), torch.ones(24))
        assert torch.equal(initial_value(name, MODEL, seed=9, start=(5,), shape=(3,)), torch.ones(3))


def test_depth_scales_only_the_residual_projections() -> None:
    deeper = replace(MODEL, num_layers=12)
    for name in parameter_shapes(MODEL):
        ratio = 2.0 if is_residual_projection(name) else 1.0
        torch.testing.assert_close(initial_value(name, deeper, 1) * ratio, initial_value(name, MODEL, 1))


def test_padding_the_vocabulary_leaves_the_other_rows_as_they_were() -> None:
    shorter = replace(MODEL, vocab_size=CHUNK_ROWS + 5)
    assert torch.equal(initial_value(EMBEDDING, shorter, 1), initial_value(EMBEDDING, MODEL, 1)[: CHUNK_ROWS + 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_has_the_same_values_rounded(dtype: torch.dtype) -> None:
    whole = initial_value(EMBEDDING, MODEL, seed=1)
    assert torch.equal(initial_value(EMBEDDING, MODEL, seed=1, dtype=dtype), whole.to(dtype))


def test_the_values_are_pinned() -> None:
    """Checkpoints do not hold first values, but a resumed comparison or a published run does rely on them."""
    corner = initial_value("model.layers.1.self_attn.o_proj.weight", MODEL, seed=1234, shape=(1, 4))
    expected = torch.tensor([[-0.005075004, -0.01020564, 0.0003315515, -0.008267552]])
    torch.testing.assert_close(corner, expected, rtol=1e-5, atol=0)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first, next_draws = initial_value(EMBEDDING, MODEL, 1), (torch.rand(1).item(), np.random.random_sample())
    assert torch.equal(initial_value(EMBEDDING, MODEL, 1), first)
    torch.manual_seed(1)
    np.random.seed(1)
    assert (torch.rand(1).item(), np.random.random_sample()) == next_draws


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"model\.layers\.3\.pre_attn_norm\.weight is not a parameter of this model"):
        initial_value("model.layers.3.pre_attn_norm.weight", MODEL, 1)


@pytest.mark.parametrize(
    ("start", "shape"),
    [((0, 0), (24, 33)), ((-1, 0), (2, 2)), ((20, 0), (5, 32)), ((0, 0), (-1, 4)), ((0,), (4,)), ((0, 0), (4, 4, 1))],
)
def test_a_block_outside_the_tensor_is_refused(start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(ShapeError, match=r"has shape \[24, 32\]; the block at .* leaves it"):
        initial_value(name, MODEL, 1, start=start, shape=shape)
