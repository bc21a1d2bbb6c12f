"""Laws of the router: every implementation is the fp64 reference, forward and every gradient; tokens are conserved."""

import pytest
import torch
from torch import Tensor

from megagrok.kernels.router import Router, Scores, choose_router
from megagrok.kernels.router.reference import route as reference

# A logit is a sum of up to 192 products, off by sqrt(192) 2^-24 = 8e-7 of its terms' sizes; the soft-cap's tanh and the
# exponential of logits up to 30 each add 30 * 2^-24 = 2e-6; sums over 300 tokens of those; four times, for safety.
FP32 = 2e-5
NO_CAP, LOW_CAP, GROK_CAP, HIGH_CAP = None, 2.0, 30.0, 500.0


@pytest.fixture(params=["torch", "triton"])
def route(request: pytest.FixtureRequest, device: torch.device) -> Router:
    return choose_router(request.param, device)


def make(tokens: int, hidden: int, experts: int, top_k: int, device: torch.device, size: float = 1.0) -> list[Tensor]:
    """x, weight, and gradients of weights, probability sum and z sum; the same numbers on every device."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=numbers)
    weight = torch.randn(experts, hidden, generator=numbers) * (size / hidden**0.5)
    gradients = [torch.randn(shape, generator=numbers) for shape in ((tokens, top_k), (experts,), ())]
    return [tensor.to(device) for tensor in (x, weight, *gradients)]


def outcome(
    route: Router, tensors: list[Tensor], *, cap: float | None, scores: Scores = "softmax", renormalize: bool = False
) -> dict[str, Tensor]:
    """Results and gradients."""
    x_TD, weight_ED = (tensor.detach().clone().requires_grad_() for tensor in tensors[:2])
    top_k = tensors[2].shape[1]
    routed = route(x_TD, weight_ED, cap=cap, top_k=top_k, scores=scores, renormalize=renormalize)
    with_gradient = [routed.weights_TK, routed.probability_sum_E, routed.z_sum]
    torch.autograd.backward(with_gradient, tensors[2:])
    assert x_TD.grad is not None and weight_ED.grad is not None
    return {
        "weights": routed.weights_TK.detach(),
        "experts": routed.experts_TK,
        "tokens per expert": routed.tokens_per_expert_E,
        "probability sum": routed.probability_sum_E.detach(),
        "z sum": routed.z_sum.detach(),
        "gradient of x": x_TD.grad,
        "gradient of weight": weight_ED.grad,
    }


def assert_close(seen: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = FP32) -> None:
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(seen[name], value), name
        elif value.numel():
            scale, error = value.abs().max().item(), (seen[name].double() - value).abs().max().item()
            assert error <= tolerance * max(scale, 1.0), f"{name} is off by {error} of {scale}"


@pytest.mark.parametrize("renormalize", [False, True], ids=["as they are", "renormalised"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("cap", [NO_CAP, LOW_CAP, GROK_CAP, HIGH_CAP])
def test_it_is_the_reference_with_every_gradient(
    route: Router, cap: float | None, scores: Scores, renormalize: bool, device: torch.device
) -> None:
    tensors = make(63, 48, 8, 2, device, size=3.0)
    expected = outcome(
        reference, [tensor.double() for tensor in tensors], cap=cap, scores=scores, renormalize=renormalize
    )
    assert_close(outcome(route, tensors, cap=cap, scores=scores, renormalize=renormalize), expected)


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "top_k"),
    [(0, 16, 8, 2), (1, 16, 8, 2), (300, 192, 64, 8), (63, 17, 5, 5), (7, 3, 1, 1), (130, 32, 100, 6)],
)
def test_ragged_sizes_are_the_reference_too(
    route: Router, tokens: int, hidden: int, experts: int, top_k: int, device: torch.device
) -> None:
    tensors = make(tokens, hidden, experts, top_k, device)
    expected = outcome(reference, [tensor.double() for tensor in tensors], cap=GROK_CAP)
    assert_close(outcome(route, tensors, cap=GROK_CAP), expected)
