"""A wrong factor is named by the sizes of the layout that make it up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagrok.verify.diagnose import name_factor, projection

SIZES = {"EP": 4, "TP": 2, "DP": 8, "expert replicas": 16}


@pytest.mark.parametrize(
    ("factor", "named"),
    [
        (4.0, "x EP"),
        (0.25, "/ EP"),
        (2.0, "x TP"),
        (0.125, "/ DP"),
        (math.sqrt(2), "x sqrt(TP)"),
        (1 / math.sqrt(8), "/ sqrt(DP)"),
        (32.0, "x EP x DP"),
        (1 / 32, "/ (EP x DP)"),
        (16.0, "x expert replicas"),
        (0.0, "missing: it is zero"),
        (3.98, "x EP"),
    ],
)
def test_a_factor_is_named_by_the_sizes_that_make_it(factor: float, named: str) -> None:
    assert named in name_factor(factor, SIZES)


@pytest.mark.parametrize("factor", [0.7, 1.0, 2.9, 3.9, -4.0])
def test_a_factor_that_no_size_makes_has_no_name(factor: float) -> None:
    assert name_factor(factor, SIZES) == []


def test_of_equal_sizes_the_one_that_concerns_the_parameter_comes_first() -> None:
    sizes = {"TP": 2, "EP": 2, "DP": 2}
    assert name_factor(2.0, sizes, first="EP")[0] == "x EP"
    assert name_factor(2.0, sizes, first="DP")[0] == "x DP"
    assert set(name_factor(2.0, sizes)) == {"x TP", "x EP", "x DP"}


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from(["x", "/"]))
def test_a_single_size_is_always_found(size: int, sign: str) -> None:
    assert f"{sign} EP" in name_factor(size if sign == "x" else 1 / size, {"EP": size})


def test_a_projection_finds_the_factor_and_what_is_left() -> None:
    true = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor, rest = projection(3 * true, true)
    assert factor == pytest.approx(3)
    assert rest == pytest.approx(0, abs=1e-12)
    half = true.clone()
    half[50:] = 0
    factor, rest = projection(half, true)
    assert 0 < factor < 1
    assert rest > 0.1
    assert all(math.isnan(value) for value in projection(true, torch.zeros_like(true)))
