"""Laws of the router: every implementation is the fp64 reference, forward and every gradient; tokens are conserved."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megagrok.errors import KernelError
from megagrok.kernels.router import Router, Scores, choose_router
from megagrok.kernels.router.reference import route as reference

# A logit is a sum of up to 192 products, off by sqrt(192) 2^-24 = 8e-7 of its terms' sizes; the soft-cap's tanh and the
# exponential of logits up to 30 each add 30 * 2^-24 = 2e-6; sums over 300 tokens of those; four times, for safety.
FP32 = 2e-5
NO_CAP, LOW_CAP, GROK_CAP, HIGH_CAP = None, 2.0, 30.0, 500.0


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What nobody has written reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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
    [(0, 16, 8, 2), (1, 16, 8, 2), (65, 192, 64, 8), (63, 17, 5, 5), (7, 3, 1, 1), (21, 32, 100, 6), (1500, 8, 3, 2)],
)
def test_ragged_sizes_are_the_reference_too(
    route: Router, tokens: int, hidden: int, experts: int, top_k: int, device: torch.device
) -> None:
    tensors = make(tokens, hidden, experts, top_k, device)
    expected = outcome(reference, [tensor.double() for tensor in tensors], cap=GROK_CAP)
    assert_close(outcome(route, tensors, cap=GROK_CAP), expected)


def test_bf16_tokens_are_routed_in_fp32(route: Router, device: torch.device) -> None:
    tensors = make(63, 48, 8, 2, device)
    tensors[:2] = [tensor.bfloat16() for tensor in tensors[:2]]
    seen, expected = (
        outcome(function, inputs, cap=GROK_CAP)
        for function, inputs in ((route, tensors), (reference, [tensor.double() for tensor in tensors]))
    )
    assert seen["weights"].dtype == torch.float32
    for name in ("gradient of x", "gradient of weight"):
        assert seen[name].dtype == torch.bfloat16
        assert_close({name: seen.pop(name)}, {name: expected.pop(name)}, tolerance=4e-3)
    assert_close(seen, expected)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_tokens_and_probability_are_conserved(route: Router, scores: Scores, device: torch.device) -> None:
    x_TD, weight_ED, *_ = make(300, 32, 12, 3, device)
    routed = route(x_TD, weight_ED, cap=GROK_CAP, top_k=3, scores=scores, renormalize=True)
    assert int(routed.tokens_per_expert_E.sum()) == 300 * 3
    assert all(len(set(row)) == 3 for row in routed.experts_TK.tolist()), "a token visits each expert at most once"
    assert torch.equal(routed.experts_TK.flatten().bincount(minlength=12), routed.tokens_per_expert_E)
    assert routed.probability_sum_E.sum().item() == pytest.approx(300, rel=1e-5)
    torch.testing.assert_close(routed.weights_TK.sum(dim=-1), torch.ones(300, device=device))
    assert bool((routed.weights_TK.diff(dim=-1) <= 0).all()), "the best comes first"


def test_all_tokens_may_go_to_one_expert(route: Router, device: torch.device) -> None:
    x_TD, weight_ED, *gradients = make(63, 48, 8, 1, device)
    x_TD[:, 0], weight_ED[5, 0] = 10.0, 10.0
    tensors = [x_TD, weight_ED, *gradients]
    seen = outcome(route, tensors, cap=GROK_CAP)
    assert seen["tokens per expert"].tolist() == [0, 0, 0, 0, 0, 63, 0, 0]
    assert_close(seen, outcome(reference, [tensor.double() for tensor in tensors], cap=GROK_CAP))


def test_between_equals_each_is_chosen_once(route: Router, device: torch.device) -> None:
    x_TD, weight_ED, *_ = make(63, 48, 8, 2, device)
    routed = route(x_TD, weight_ED * 0, cap=None, top_k=4, scores="softmax", renormalize=False)
    assert all(len(set(row)) == 4 for row in routed.experts_TK.tolist())
    assert torch.equal(routed.weights_TK, torch.full_like(routed.weights_TK, 1 / 8))


@pytest.mark.parametrize("cap", [NO_CAP, HIGH_CAP])
def test_logits_may_be_larger_than_an_exponential_can(route: Router, cap: float | None, device: torch.device) -> None:
    tensors = make(63, 48, 8, 1, device, size=100.0)
    assert (tensors[0] @ tensors[1].t()).abs().max() > 200, "e^200 is no fp32"
    expected = outcome(reference, [tensor.double() for tensor in tensors], cap=cap)
    # Logits of some 300 are off by a few times 300 * 2^-24 = 2e-5, and their exponentials by that share.
    assert_close(outcome(route, tensors, cap=cap), expected, tolerance=1e-3)


@pytest.mark.parametrize("wanted", range(3), ids=["weights", "probability sum", "z sum"])
def test_each_gradient_comes_alone_too(route: Router, wanted: int, device: torch.device) -> None:
    """As where the balance loss is off, or a frozen layer needs no weights' gradient."""
    x_TD, weight_ED, *gradients = make(63, 48, 8, 2, device)
    found = []
    for function, inputs in ((route, x_TD), (reference, x_TD.double())):
        x, weight = inputs.clone().requires_grad_(), weight_ED.to(inputs.dtype).requires_grad_()
        routed = function(x, weight, cap=GROK_CAP, top_k=2, scores="softmax", renormalize=False)
        output = (routed.weights_TK, routed.probability_sum_E, routed.z_sum)[wanted]
        dx, dweight = torch.autograd.grad(output, [x, weight], gradients[wanted].to(output.dtype))
        found.append({"x": dx, "weight": dweight})
    assert_close(found[0], found[1])


def test_the_same_call_gives_the_same_bits(route: Router, device: torch.device) -> None:
    tensors = make(300, 48, 8, 2, device)
    first, second = (outcome(route, tensors, cap=GROK_CAP) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_is_not_a_number_stays_so_and_breaks_no_index(route: Router, device: torch.device) -> None:
    """The guard of the step reports it; until then nothing may read outside of a buffer."""
    x_TD, weight_ED, *_ = make(63, 48, 8, 2, device)
    x_TD[7] = float("nan")
    routed = route(x_TD, weight_ED, cap=GROK_CAP, top_k=2, scores="softmax", renormalize=False)
    assert bool(routed.weights_TK[7].isnan().all())
    assert bool(routed.z_sum.isnan())
    assert len(set(routed.experts_TK[7].tolist())) == 2
    assert 0 <= int(routed.experts_TK.min()) <= int(routed.experts_TK.max()) < 8
    assert int(routed.tokens_per_expert_E.sum()) == 63 * 2


class _CountsGiven(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """As a rehearsal does: fake tensors hold no numbers to count."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten.bincount.default:
            return args[0].new_empty(8)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_needs_no_number_to_go_on(dtype: torch.dtype) -> None:
    route = choose_router("torch", torch.device("cpu"))
    with FakeTensorMode(), _CountsGiven():  # type: ignore[no-untyped-call]
        x_TD, weight_ED = (torch.empty(size, 64, dtype=dtype, requires_grad=True) for size in (1000, 8))
        routed = route(x_TD, weight_ED, cap=GROK_CAP, top_k=2, scores="softmax", renormalize=True)
        torch.autograd.backward(routed.weights_TK.sum() + routed.probability_sum_E.sum() + routed.z_sum)
    assert x_TD.grad is not None
    assert x_TD.grad.shape == (1000, 64)


def test_what_does_not_fit_is_refused(route: Router, device: torch.device) -> None:
    x_TD, weight_ED, *_ = make(63, 48, 8, 2, device)
    with pytest.raises(KernelError, match=r"weight \[experts, hidden\], got \[63, 48\] and \[8, 47\]"):
        route(x_TD, weight_ED[:, 1:], cap=None, top_k=2, scores="softmax", renormalize=False)
    for wanted in (0, 9):
        with pytest.raises(KernelError, match=f"8 experts, so top_k must be in 1..8, got {wanted}"):
            route(x_TD, weight_ED, cap=None, top_k=wanted, scores="softmax", renormalize=False)


def test_triton_refuses_what_it_cannot_hold(device: torch.device) -> None:
    triton = choose_router("triton", device)
    x_TD = torch.zeros(1, 2, device=device)
    with pytest.raises(KernelError, match="up to 4096 experts, got 4097. Fix: kernels.router=torch"):
        triton(x_TD, torch.zeros(4097, 2, device=device), cap=None, top_k=2, scores="softmax", renormalize=False)
    with pytest.raises(KernelError, match="x is fp64. Fix: kernels.router=torch"):
        triton(x_TD.double(), torch.zeros(8, 2, device=device), cap=None, top_k=2, scores="softmax", renormalize=False)
