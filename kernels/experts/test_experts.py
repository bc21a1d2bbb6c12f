"""Laws of the experts: every implementation, outputs and every gradient, against the reference in fp64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megagrok.errors import KernelError, ShapeError
from megagrok.kernels.experts import Experts, choose_experts, reference, torch_ops

IMPLEMENTATIONS = ["torch", "grouped_mm", "triton"]
# Relative to the size of the values compared: the longest sum here has 1,000 terms, and a bf16 result has 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ROWS = {
    "no token": [0, 0, 0],
    "one row": [0, 1, 0],
    "63 rows": [63],
    "an empty expert": [5, 0, 40, 17],
    "all to one": [0, 90, 0],
    "1000 rows": [1000, 2, 30],
}


@pytest.fixture(params=IMPLEMENTATIONS)
def experts(request: pytest.FixtureRequest, device: torch.device) -> Experts:
    return choose_experts(request.param, device)


def make_inputs(
    rows_per_expert: list[int], hidden: int, width: int, dtype: torch.dtype, device: torch.device, top_k: int = 1
) -> list[Tensor]:
    """x_ND, source_R, weight_R, gate_up_eFD, down_eDF; with top_k 1 the sources are a permutation."""
    generator = torch.Generator().manual_seed(sum(rows_per_expert) + hidden)
    rows, num_experts = sum(rows_per_expert), len(rows_per_expert)
    source_R = torch.randperm(rows, generator=generator) // top_k
    x_ND = torch.randn(rows // top_k, hidden, generator=generator)
    weight_R = torch.rand(rows, generator=generator)
    gate_up_eFD = torch.randn(num_experts, 2 * width, hidden, generator=generator) * hidden**-0.5
    down_eDF = torch.randn(num_experts, hidden, width, generator=generator) * width**-0.5
    tensors = [x_ND.to(dtype), source_R, weight_R, gate_up_eFD.to(dtype), down_eDF.to(dtype)]
    return [tensor.to(device) for tensor in tensors]


def narrow_dtype(experts: Experts, device: torch.device) -> torch.dtype:
    """bf16; Triton's interpreter multiplies it wrongly (triton 3.9), but not fp16."""
    is_interpreted = experts is choose_experts("triton", device) and device.type == "cpu"
    return torch.float16 if is_interpreted else torch.bfloat16


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten is NaN, so what a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def route(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """source_R and rows_per_expert of tokens that each choose top_k different experts at random."""
    scores_TE = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    experts_R = scores_TE.topk(top_k, dim=1).indices.flatten()
    return experts_R.argsort(stable=True) // top_k, experts_R.bincount(minlength=num_experts).tolist()


def run(experts: Callable[..., Tensor], inputs: list[Tensor], rows_per_expert: list[int]) -> list[Tensor]:
    """Output, and the gradients of x, weight, gate_up and down."""
    x_ND, source_R, weight_R, gate_up_eFD, down_eDF = inputs
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x_ND, weight_R, gate_up_eFD, down_eDF)]
    out_ND = experts(leaves[0], source_R, leaves[1], rows_per_expert, leaves[2], leaves[3])
    dout_ND = torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(7)).to(out_ND)
    return [out_ND.detach(), *torch.autograd.grad(out_ND, leaves, dout_ND)]


def wanted(inputs: list[Tensor], rows_per_expert: list[int]) -> list[Tensor]:
    """The same of the reference, in fp64."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    return run(reference.mix_experts, wide, rows_per_expert)


def assert_equal_to_reference(experts: Experts, inputs: list[Tensor], rows_per_expert: list[int]) -> None:
    names = ["out", "dx", "dweight", "dgate_up", "ddown"]
    dtype = inputs[0].dtype
    for name, got, true in zip(
        names, run(experts, inputs, rows_per_expert), wanted(inputs, rows_per_expert), strict=True
    ):
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        message = f"{name} of {rows_per_expert}"
        torch.testing.assert_close(
            got.double(), true, rtol=0, atol=TOLERANCE[dtype] * scale, msg=lambda m, k=message: f"{k}: {m}"
        )


@pytest.mark.parametrize("is_narrow", [False, True], ids=["fp32", "narrow"])
@pytest.mark.parametrize("rows_per_expert", ROWS.values(), ids=ROWS)
def test_output_and_every_gradient_equal_the_reference(experts, device, rows_per_expert, is_narrow):
    dtype = narrow_dtype(experts, device) if is_narrow else torch.float32
    inputs = make_inputs(rows_per_expert, 24, 40, dtype, device)
    assert_equal_to_reference(experts, inputs, rows_per_expert)


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 2, 2), (63, 2, 8), (40, 3, 4), (10, 8, 8)])
def test_the_rows_of_one_token_are_summed(experts, device, num_tokens, top_k, num_experts):
    source_R, rows_per_expert = route(num_tokens, top_k, num_experts)
    inputs = make_inputs(rows_per_expert, 16, 8, torch.float32, device, top_k)
    inputs[1] = source_R.to(device)
    assert_equal_to_reference(experts, inputs, rows_per_expert)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows_per_expert", [[0, 0], [17, 0, 1, 40]], ids=str)
def test_nothing_is_left_unwritten(experts, device, rows_per_expert):
    assert torch.empty(3).isnan().all()
    assert_equal_to_reference(experts, make_inputs(rows_per_expert, 24, 40, torch.float32, device), rows_per_expert)


@settings(max_examples=25, deadline=None)
@given(rows_per_expert=st.lists(st.integers(0, 40), min_size=1, max_size=6), most=st.integers(1, 50))
def test_the_result_does_not_depend_on_the_length_of_runs(rows_per_expert, most):
    device = torch.device("cpu")
    inputs = make_inputs(rows_per_expert, 8, 4, torch.float64, device)
    inputs[2] = inputs[2].double()
    before, torch_ops.CPU_RUN_ROWS = torch_ops.CPU_RUN_ROWS, most
    try:
        assert_equal_to_reference(torch_ops.mix_experts, inputs, rows_per_expert)
    finally:
        torch_ops.CPU_RUN_ROWS = before


def test_a_row_without_weight_changes_nothing_but_its_own_weight_gradient(experts, device):
    inputs = make_inputs([6, 6], 16, 8, torch.float32, device)
    inputs[2] = torch.zeros_like(inputs[2])
    out, dx, dweight, dgate_up, ddown = run(experts, inputs, [6, 6])
    assert not any(tensor.any() for tensor in (out, dx, dgate_up, ddown))
    assert dweight.all()


def test_experts_without_rows_have_zero_gradients(experts, device):
    *_, dgate_up, ddown = run(experts, make_inputs([0, 9, 0], 16, 8, torch.float32, device), [0, 9, 0])
    for number, is_used in enumerate([False, True, False]):
        assert bool(dgate_up[number].any()) is bool(ddown[number].any()) is is_used


def test_two_runs_give_the_same_bits(experts, device):
    source_R, rows_per_expert = route(60, 2, 3)
    inputs = make_inputs(rows_per_expert, 16, 8, torch.float32, device, 2)
    inputs[1] = source_R.to(device)
    for once, again in zip(run(experts, inputs, rows_per_expert), run(experts, inputs, rows_per_expert), strict=True):
        assert torch.equal(once, again)


def test_only_x_the_preactivations_and_routing_are_kept(experts, device):
    rows_per_expert = [32, 0, 96]
    x, source, weight, gate_up, down = make_inputs(rows_per_expert, 16, 8, torch.float32, device)
    parameters = {gate_up.requires_grad_().data_ptr(), down.requires_grad_().data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x.requires_grad_(), source, weight.requires_grad_(), rows_per_expert, gate_up, down)
    preactivations = 128 * 2 * 8 * 4
    routing = 2 * 128 * (8 + 4)
    assert sum(kept.values()) <= x.numel() * 4 + preactivations + routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_alone_are_enough_and_all_matmuls_are_counted(dtype):
    experts, rows_per_expert, hidden, width = choose_experts("torch", torch.device("cpu")), [700, 0, 1000], 16, 8
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        inputs = [
            torch.empty(1700, hidden, dtype=dtype, requires_grad=True),
            torch.empty(1700, dtype=torch.int64),
            torch.empty(1700, requires_grad=True),
            torch.empty(3, 2 * width, hidden, dtype=dtype, requires_grad=True),
            torch.empty(3, hidden, width, dtype=dtype, requires_grad=True),
        ]
        x, source, weight, gate_up, down = inputs
        out = experts(x, source, weight, rows_per_expert, gate_up, down)
        out.backward(torch.empty_like(out))
        assert out.shape == x.shape and gate_up.grad.shape == gate_up.shape
    assert counted.get_total_flops() == 3 * (2 * 1700 * hidden * 3 * width)


def test_arguments_that_do_not_fit_are_refused_by_name(experts, device):
    x, source, weight, gate_up, down = make_inputs([4, 4], 16, 8, torch.float32, device)
    with pytest.raises(ShapeError, match=r"has to be \[e, 2F, D\] = \[2, 16, 16\]"):
        experts(x, source, weight, [4, 4], gate_up[:, :8], down)
    with pytest.raises(ShapeError, match=r"x_ND is \[8, 8\].*D = 16"):
        experts(x[:, :8], source, weight, [4, 4], gate_up, down)
    with pytest.raises(ShapeError, match="names 1 experts; the weights hold 2"):
        experts(x, source, weight, [8], gate_up, down)
    with pytest.raises(ShapeError, match=r"sums to 9, so both have to be \[9\]"):
        experts(x, source, weight, [4, 5], gate_up, down)
    with pytest.raises(KernelError, match=r"source_R is torch.int32"):
        experts(x, source.int(), weight, [4, 4], gate_up, down)
    with pytest.raises(KernelError, match="convert x or the weights"):
        experts(x.double(), source, weight, [4, 4], gate_up, down)
