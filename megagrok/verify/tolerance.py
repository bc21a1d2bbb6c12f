"""How far a layout may be from the oracle: four numbers in fp32, each with its reason. The tests use the same ones.

The unit is fp32's rounding, u = 2^-24 = 6.0e-8: one addition or multiplication is off by at most u of its result. A sum
of n terms added in two orders differs by about sqrt(n) u of the sum of their sizes, n u at the worst. A layout changes
nothing but orders: over the ranks of a split matrix, over micro-batches, over data-parallel ranks.
"""

from typing import Final

LOSS: Final = 1.0e-6
"""Mean token loss, absolute, two layouts of one fp32 model. A loss of about 6 is a mean over some 1000 tokens of sums
over some 1000 logits: sqrt(1000) u = 1.9e-6 of a single token's loss, averaged over independent tokens to 6e-8.
Relative for the routers' losses, which are sums over layers of any size."""

GRADIENT: Final = 1.0e-5
"""Norm of the difference of one parameter's gradients, over the gradient's norm. A chain of some 50 matrix products,
each off by sqrt(100) u = 6e-7 in independent directions: sqrt(50) * 6e-7 = 4e-6, and twice that for safety."""

GRAD_NORM: Final = 2.0e-6
"""Global gradient norm, relative; the clip coefficient too. Errors across the parameters are independent of the
gradient, so they enter the norm by their projection on it: a tenth of GRADIENT, and twice that for safety."""

WEIGHTS: Final = 5.0e-5
"""Any weight after five AdamW steps, absolute, at lr 1e-2 and eps 1e-5. A step moves a weight by at most about lr; its
relative error is at most that of m / (sqrt(v) + eps). eps keeps a gradient near zero from becoming a step of either
sign: an error of 1e-9 in such a gradient moves the weight by lr * 1e-9 / 1e-5 = 1e-6 a step. Growth over five steps,
where later gradients see the moved weights, takes the rest."""
