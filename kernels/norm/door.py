"""What every implementation of the norm asks of its tensors before it touches them."""

from torch import Tensor

from megagrok.errors import KernelError


def check_shapes(x: Tensor, gain: Tensor, residual: Tensor | None) -> None:
    """gain [D], x [..., D], residual like x. Raises KernelError."""
    if gain.shape != x.shape[-1:]:
        raise KernelError(
            f"norm needs a gain of shape [{x.shape[-1]}], the last of x {list(x.shape)}, got {list(gain.shape)}."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise KernelError(
            f"add_rms_norm needs a residual like x, {list(x.shape)} {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}."
        )
