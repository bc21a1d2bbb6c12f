"""Laws of permute and unpermute: every implementation against the reference in fp64, and each the other's backward."""

import pytest
import torch
from torch import Tensor

from megagrok.errors import KernelError, ShapeError
from megagrok.kernels.permute import Permute, choose_permute, reference

SIZES = [(0, 2, 8), (1, 1, 8), (1, 3, 5), (63, 2, 17), (1000, 2, 4), (40, 8, 64)]
IMPLEMENTATIONS = ["torch", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def moves(request: pytest.FixtureRequest, device: torch.device) -> Permute:
    return choose_permute(request.param, device)


def make_order(num_tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """token_R of rows in a random order, and inverse_TK."""
    order = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(0))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return (order // top_k).to(device), inverse.view(num_tokens, top_k).to(device)


def both(moves_fn, reference_fn, inputs, device, dtype):
    """Outputs and gradients: (of the implementation, of the reference in fp64), each a list."""
    results = []
    for fn, kind in ((moves_fn, None), (reference_fn, torch.float64)):
        leaves = [leaf.to(kind or leaf.dtype).detach().requires_grad_() for leaf in inputs]
        out = fn(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        results.append([out, *gradients])
    return results


def assert_near(results, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden"), SIZES)
def test_permute_and_its_gradient_equal_the_reference(moves, device, num_tokens, top_k, hidden, dtype):
    token_R, inverse_TK = make_order(num_tokens, top_k, device)
    x_TD = torch.randn(num_tokens, hidden).to(device, dtype)
    for inverse in (None, inverse_TK):
        assert_near(
            both(
                lambda x, i=inverse: moves.permute(x, token_R, i),
                lambda x: reference.permute(x, token_R),
                [x_TD],
                device,
                dtype,
            ),
            dtype,
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden"), SIZES)
def test_unpermute_and_its_gradients_equal_the_reference(moves, device, num_tokens, top_k, hidden, dtype, weighted):
    _, inverse_TK = make_order(num_tokens, top_k, device)
    inputs = [torch.randn(num_tokens * top_k, hidden).to(device, dtype)]
    if weighted:
        inputs.append(torch.rand(num_tokens, top_k).to(device))
    results = both(
        lambda rows, weights=None: moves.unpermute(rows, inverse_TK, weights),
        lambda rows, weights=None: reference.unpermute(rows, inverse_TK, weights),
        inputs,
        device,
        dtype,
    )
    assert_near(results, dtype)


def test_a_token_that_went_out_comes_back_as_often_as_it_went(moves, device):
    token_R, inverse_TK = make_order(37, 4, device)
    x_TD = torch.randint(-8, 8, (37, 12)).to(device, torch.float32)
    assert torch.equal(moves.unpermute(moves.permute(x_TD, token_R), inverse_TK), 4 * x_TD)


def test_the_sum_of_a_token_does_not_depend_on_the_run(moves, device):
    _, inverse_TK = make_order(100, 8, device)
    rows, weights = torch.randn(800, 33, device=device), torch.rand(100, 8, device=device)
    first = moves.unpermute(rows, inverse_TK, weights)
    assert all(torch.equal(first, moves.unpermute(rows, inverse_TK, weights)) for _ in range(3))


def test_shapes_that_do_not_fit_are_refused_by_name(moves, device):
    x = torch.zeros(4, 3, device=device)
    with pytest.raises(ShapeError, match="names 7 rows of 4 tokens"):
        moves.permute(x, torch.zeros(7, dtype=torch.int64, device=device))
    with pytest.raises(KernelError, match=r"token_R is torch.int32"):
        moves.permute(x, torch.zeros(8, dtype=torch.int32, device=device))
    with pytest.raises(ShapeError, match=r"R = T \* K"):
        moves.unpermute(x, torch.zeros(3, 2, dtype=torch.int64, device=device))
    with pytest.raises(ShapeError, match=r"weights_TK is \[2, 1\]"):
        moves.unpermute(x, torch.zeros(2, 2, dtype=torch.int64, device=device), torch.zeros(2, 1, device=device))
