"""What attention accepts, checked once for all implementations, and the factors that they share."""

# s queries, S keys, b micro-batch, h query heads, g kv heads, c head width

import math

import torch
from torch import Tensor

from megagrok.errors import KernelError

LOG2_E = math.log2(math.e)
"""Scores times this are exponents of 2, which devices raise faster than e."""


def slope_of(width: int, cap: float | None) -> float:
    """Of d score / d (q k), beside sigmoid' = w (1 - w): d tanh(x) / dx = 1 - tanh^2 = 4 w (1 - w)."""
    return (1.0 if cap is None else 4.0) / math.sqrt(width)


def check_shapes(
    q_sbhc: Tensor,
    k_Sbgc: Tensor,
    v_Sbgc: Tensor,
    cap: float | None,
    tau_s: Tensor | None,
    positions: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise KernelError with all that does not fit. Looks at shapes and dtypes only, so it waits for no device."""
    if q_sbhc.ndim != 4 or k_Sbgc.ndim != 4:
        raise KernelError(
            f"attention of q {_shape(q_sbhc)} and k {_shape(k_Sbgc)}; needs [positions, batch, heads, width]."
        )
    (s, b, h, c), (S, _, g, _) = q_sbhc.shape, k_Sbgc.shape
    wrong = []
    if k_Sbgc.shape != (S, b, g, c) or v_Sbgc.shape != k_Sbgc.shape:
        wrong.append(
            f"k {_shape(k_Sbgc)} and v {_shape(v_Sbgc)}, need both [{S}, {b}, kv heads, {c}] as q {_shape(q_sbhc)}"
        )
    if g == 0 or h % g:
        wrong.append(f"{h} query heads, need a multiple of the {g} kv heads")
    if cap is not None and cap <= 0:
        wrong.append(f"cap = {cap}, needs a number above 0, or None")
    if len({q_sbhc.dtype, k_Sbgc.dtype, v_Sbgc.dtype}) > 1 or not q_sbhc.is_floating_point():
        wrong.append(f"q, k, v of {q_sbhc.dtype}, {k_Sbgc.dtype}, {v_Sbgc.dtype}, need one floating dtype")
    if tau_s is not None and (tau_s.shape != (s,) or tau_s.dtype not in (torch.float32, torch.float64)):
        wrong.append(f"tau {_shape(tau_s)} of {tau_s.dtype}, needs [{s}] of torch.float32")
    if positions is None and s != S:
        wrong.append(f"{s} queries and {S} keys without positions, need as many or their positions")
    if positions is not None and (positions[0].shape != (s,) or positions[1].shape != (S,)):
        wrong.append(f"positions {_shape(positions[0])} and {_shape(positions[1])}, need [{s}] and [{S}]")
    if wrong:
        raise KernelError("attention: " + "; ".join(wrong) + ".")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
