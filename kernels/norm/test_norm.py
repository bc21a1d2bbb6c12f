"""Laws of RMSNorm: every implementation is the fp64 reference, forward and every gradient; what is kept; refusals."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megagrok.errors import KernelError
from megagrok.kernels.norm import Norm, choose_norm, reference

EPS = 1e-5
# fp32 rounds by 2^-24; sums of up to 1,000 terms, four times their random walk: 4 * sqrt(1000) * 2^-24 = 7.5e-6.
FP32 = 1e-5
# bf16 rounds by 2^-9 = 2e-3; twice, where torch's own kernel on a GPU rounds before it adds.
BF16 = 8e-3


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
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


@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_is_the_reference_rounded_at_the_end(
    norm: Norm, gain_dtype: torch.dtype, add: bool, device: torch.device
) -> None:
    tensors = make((63, 192), device, torch.bfloat16)
    tensors[2] = tensors[2].to(gain_dtype)
    seen = outcome(norm, tensors, add=add)
    assert_close(seen, outcome(reference, [tensor.double() for tensor in tensors], add=add), BF16)
    assert seen["y"].dtype == seen["x"].dtype == torch.bfloat16
    assert seen["gain"].dtype == gain_dtype


def test_strides_do_not_matter(norm: Norm, device: torch.device) -> None:
    residual, x, gain, gradient = make((5, 63, 64), device)
    expected = outcome(norm, [residual, x, gain, gradient], add=True)
    turned = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (residual, x)]
    assert_close(outcome(norm, [*turned, gain, gradient], add=True), expected, 0.0)


def test_the_same_call_gives_the_same_bits(norm: Norm, device: torch.device) -> None:
    tensors = make((301, 192), device)
    assert_close(outcome(norm, tensors, add=True), outcome(norm, tensors, add=True), 0.0)


def test_a_longer_row_is_normed_alike_and_pulls_less(norm: Norm, device: torch.device) -> None:
    """Powers of two, so that nothing is rounded: y does not change, and the gradient shrinks as x grows."""
    _, x, gain, gradient = make((64, 64), device)
    x.requires_grad_()
    results = {}
    for factor in (1.0, 1024.0):
        y = norm.rms_norm(x * factor, gain, 0.0)
        (dx,) = torch.autograd.grad(y, x, gradient)
        results[factor] = y.detach(), dx
    assert torch.equal(results[1.0][0], results[1024.0][0])
    torch.testing.assert_close(results[1.0][1], results[1024.0][1], rtol=1e-5, atol=1e-6)
    # Along x itself nothing changes y.
    along_R = (results[1.0][1] * x.detach()).sum(dim=-1)
    assert along_R.abs().max() < 1e-4


def test_it_keeps_x_and_one_number_a_row(norm: Norm, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU torch keeps what it likes")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    _, x, gain, _ = (tensor.requires_grad_() for tensor in make((63, 64), device, torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm.add_rms_norm(x, x, gain, EPS)
    assert y.requires_grad
    assert sum(kept.values()) == 2 * x.numel() + 2 * gain.numel() + 4 * 63


def test_a_frozen_gain_and_a_frozen_x_cost_the_other_nothing(norm: Norm, device: torch.device) -> None:
    residual, x, gain, gradient = make((63, 64), device)
    expected = outcome(norm, [residual, x, gain, gradient], add=False)
    x.requires_grad_()
    torch.autograd.backward(norm.rms_norm(x, gain, EPS), gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, expected["x"])
    gain.requires_grad_()
    torch.autograd.backward(norm.rms_norm(x.detach(), gain, EPS), gradient)
    assert gain.grad is not None
    assert torch.equal(gain.grad, expected["gain"])


def test_shapes_that_do_not_fit_are_refused(norm: Norm, device: torch.device) -> None:
    residual, x, gain, _ = make((63, 64), device)
    with pytest.raises(KernelError, match=r"norm needs a gain of shape \[64\], .* got \[63\]"):
        norm.rms_norm(x, gain[:63], EPS)
    with pytest.raises(KernelError, match=r"residual like x, \[63, 64\] torch.float32, got \[62, 64\]"):
        norm.add_rms_norm(residual[:62], x, gain, EPS)
    with pytest.raises(KernelError, match=r"got \[63, 64\] torch.bfloat16"):
        norm.add_rms_norm(residual.bfloat16(), x, gain, EPS)


def test_triton_refuses_what_it_cannot_hold(device: torch.device) -> None:
    triton = choose_norm("triton", device)
    x = torch.zeros(1, 16385, device=device)
    with pytest.raises(KernelError, match="rows of up to 16384, got 16385. Fix: kernels.norm=torch"):
        triton.rms_norm(x, x[0], EPS)
    with pytest.raises(KernelError, match="got torch.float64. Fix: kernels.norm=torch"):
        triton.rms_norm(x.double()[:, :8], x[0, :8], EPS)


def test_fp64_is_fp64_in_torch() -> None:
    torch_norm = choose_norm("torch", torch.device("cpu"))
    tensors = [tensor.double() for tensor in make((7, 64), torch.device("cpu"))]
    assert_close(outcome(torch_norm, tensors, add=True), outcome(reference, tensors, add=True), 1e-14)
