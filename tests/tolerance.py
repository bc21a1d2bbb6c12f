"""Every tolerance of the tests, once, with its reason. Loosening one needs a reason in the changelog.

The unit is fp32's rounding, u = 2^-24 = 6.0e-8: one addition or multiplication is off by at most u of its result. A sum
of n terms added in two orders differs by about sqrt(n) u of the sum of their sizes, n u at the worst. A layout changes
nothing but orders: over the ranks of a split matrix, over micro-batches, over data-parallel ranks.
"""

from typing import Final

from megagrok.verify import tolerance

FP32_ROUNDING: Final = 2.0**-24

LAYOUT_LOSS: Final = tolerance.LOSS
LAYOUT_GRADIENT: Final = tolerance.GRADIENT
LAYOUT_GRAD_NORM: Final = tolerance.GRAD_NORM
LAYOUT_WEIGHTS: Final = tolerance.WEIGHTS
"""Those of verify-layout, which gives the reasons."""

FP32_ELEMENTWISE: Final = 8 * FP32_ROUNDING
"""A function of single numbers, relative, written two ways: a handful of roundings."""


def fp32_sum(*, terms: int) -> float:
    """Relative to the sum of the terms' sizes: a sum in two orders. Four times the random walk's sqrt(terms) u."""
    return 4.0 * float(terms) ** 0.5 * FP32_ROUNDING


BF16_ROUNDING: Final = 2.0**-9

BF16_LAYOUT_GRADIENT: Final = 3.0e-2
"""Norm of the difference of one parameter's gradients in bf16, over the gradient's norm, where a layout adds partial
results in bf16 (tensor ranks' outputs) or multiplies other rows together (experts). A chain of some 50 roundings, each
off by half an ulp, 2^-9: sqrt(50) * 2^-9 = 1.4e-2, and twice that for safety."""

BF16_LAYOUT_LOSS: Final = 5.0e-3
"""Mean token loss in bf16, absolute: the chain's 1.4e-2 of logits of about 1, averaged over some 60 tokens to 1.8e-3,
and twice that for the steps in which the weights differ too."""
