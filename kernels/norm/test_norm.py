"""Laws of RMSNorm: every implementation is the fp64 reference, forward and every gradient."""

import pytest
import torch
from torch import Tensor

from megagrok.kernels.norm import Norm, choose_norm, reference

EPS = 1e-5
IMPLEMENTATIONS = ["torch", "triton"]
# fp32 rounds by 2^-24; sums of up to 1,000 terms, four times their random walk: 4 * sqrt(1000) * 2^-24 = 7.5e-6.
FP32 = 1e-5
# bf16 rounds by 2^-9 = 2e-3; twice, where torch's own kernel on a GPU rounds before it adds.
BF16 = 8e-3


@pytest.fixture(params=IMPLEMENTATIONS)
def norm(request: pytest.FixtureRequest, device: torch.device) -> Norm:
    return choose_norm(request.param, device)


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """residual, x, gain, gradient of the result; the same numbers on every device."""
    numbers = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=numbers) for size in (shape, shape, shape[-1:], shape)]
    tensors[1] *= torch.rand(*shape[:-1], 1, generator=numbers) * 3
    return [tensor.to(device, dtype) for tensor in tensors]


def outcome(norm: Norm, tensors: list[Tensor], *, add: bool) -> dict[str, Tensor]:
    """The result and the gradients."""
    residual, x, gain, gradient = tensors
    residual, x, gain = (tensor.detach().clone().requires_grad_() for tensor in (residual, x, gain))
    y = norm.add_rms_norm(residual, x, gain, EPS) if add else norm.rms_norm(x, gain, EPS)
    torch.autograd.backward(y, gradient)
    gradients = {"residual": residual.grad, "x": x.grad, "gain": gain.grad}
    return {"y": y.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def assert_close(seen: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 1.0
        error = (seen[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(scale, 1.0), f"{name} is off by {error} of {scale}"


@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 63), (63, 64), (5, 3, 192), (2, 1000), (301, 1000)], ids=str)
def test_it_is_the_reference_with_every_gradient(
    norm: Norm, shape: tuple[int, ...], add: bool, device: torch.device
) -> None:
    tensors = make(shape, device)
    expected = outcome(reference, [tensor.double() for tensor in tensors], add=add)
    assert_close(outcome(norm, tensors, add=add), expected, FP32)
