"""Laws of the cross-entropy: every implementation against the fp64 reference, and what it refuses."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megagrok.errors import KernelError, ShapeError
from megagrok.kernels.cross_entropy import CrossEntropy, choose_cross_entropy, reference, torch_ops
from megagrok.kernels.cross_entropy.reference import IGNORED_LABEL

# tokens, hidden, vocabulary
SIZES = [(0, 8, 16), (1, 8, 1), (1, 16, 63), (63, 24, 1000), (40, 16, 65)]
MULTIPLIER = 0.7
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Norm of the difference over the norm (at least 1): fp32 by logits 50 * 2^-24 off, the others by one rounding."""


@pytest.fixture(params=["torch", "triton"])
def cross_entropy(request: pytest.FixtureRequest, device: torch.device) -> CrossEntropy:
    return choose_cross_entropy(request.param, device)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is nan: torch fills it where it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the sizes above, of which the last is shorter."""
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(torch_ops.CHUNK_BYTES, kind, 4096)
        monkeypatch.setitem(torch_ops.FEWEST_TOKENS, kind, 16)


def make_inputs(num_tokens: int, hidden: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32; capped logits spread over most of their range, and a third of the labels not counted."""
    generator = torch.Generator().manual_seed(num_tokens + vocab_size)
    hidden_TD = torch.randn(num_tokens, hidden, generator=generator)
    weight_VD = torch.randn(vocab_size, hidden, generator=generator) * 4
    labels_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_T[1::3] = IGNORED_LABEL
    return hidden_TD, weight_VD, labels_T


def losses_and_gradients(fn, hidden_TD, weight_VD, labels_T, *, cap, **rest) -> list[Tensor]:
    """Sum, losses, and the gradients of -3 times the sum."""
    leaves = [hidden_TD.detach().requires_grad_(), weight_VD.detach().requires_grad_()]
    loss_sum, losses_T = fn(*leaves, labels_T, multiplier=MULTIPLIER, cap=cap, **rest)
    return [loss_sum.detach(), losses_T, *torch.autograd.grad(-3 * loss_sum, leaves)]


def assert_near(results: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for got, want in zip(results, wanted, strict=True):
        assert got.shape == want.shape
        tolerance = TOLERANCE[torch.float32 if got.dtype == torch.float32 else dtype]
        assert (got.double() - want).norm() <= tolerance * max(want.norm(), 1.0)


@pytest.mark.parametrize("cap", [None, 5.0, 50.0, 200.0], ids="cap {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_and_gradients_equal_the_reference(cross_entropy, device, size, dtype, cap):
    hidden_TD, weight_VD, labels_T = make_inputs(*size)
    inputs = [hidden_TD.to(device, dtype), weight_VD.to(device, dtype), labels_T.to(device)]
    results = losses_and_gradients(cross_entropy, *inputs, cap=cap, group=None, first_token=0)
    assert [result.dtype for result in results] == [torch.float32, torch.float32, dtype, dtype]
    wanted = losses_and_gradients(reference.cross_entropy, inputs[0].double(), inputs[1].double(), inputs[2], cap=cap)
    assert_near(results, wanted, dtype)


def test_gradients_that_are_not_wanted_are_not_made(cross_entropy, device):
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(37, 24, 1000))
    arguments = {"multiplier": MULTIPLIER, "cap": 50.0, "group": None, "first_token": 0}
    wanted_hidden, wanted_weight = losses_and_gradients(
        cross_entropy, hidden_TD, weight_VD, labels_T, cap=50.0, group=None, first_token=0
    )[2:]
    leaf = hidden_TD.requires_grad_()
    with FlopCounterMode(display=False) as flops:
        loss_sum, _ = cross_entropy(leaf, weight_VD, labels_T, **arguments)
    assert flops.get_total_flops() == 4 * weight_VD.numel() * 37
    assert torch.equal(torch.autograd.grad(-3 * loss_sum, leaf)[0], wanted_hidden)
    loss_sum, _ = cross_entropy(leaf.detach(), weight_VD.requires_grad_(), labels_T, **arguments)
    assert torch.equal(torch.autograd.grad(-3 * loss_sum, weight_VD)[0], wanted_weight)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        loss_sum, _ = cross_entropy(leaf, weight_VD, labels_T, **arguments)
    assert flops.get_total_flops() == 2 * weight_VD.numel() * 37
    assert not loss_sum.requires_grad


def test_a_token_without_label_has_no_loss_and_no_gradient(cross_entropy, device):
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(37, 24, 1000))
    _, losses_T, hidden_grad, weight_grad = losses_and_gradients(
        cross_entropy, hidden_TD, weight_VD, labels_T, cap=50.0, group=None, first_token=0
    )
    is_counted_T = labels_T != IGNORED_LABEL
    assert not losses_T[~is_counted_T].any()
    assert not hidden_grad[~is_counted_T].any()
    alone = losses_and_gradients(
        cross_entropy, hidden_TD[is_counted_T], weight_VD, labels_T[is_counted_T], cap=50.0, group=None, first_token=0
    )
    assert_near([losses_T.sum(), alone[1], alone[2], weight_grad], [x.double() for x in alone], torch.float32)


@pytest.mark.parametrize("cap", [None, 50.0], ids="cap {}".format)
def test_gradients_of_the_logits_sum_to_zero(cross_entropy, device, cap):
    """Without a cap, adding a vector to all rows of the weight changes nothing; with one, hardly, for small logits."""
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(37, 24, 1000))
    weight_grad = losses_and_gradients(
        cross_entropy, hidden_TD, weight_VD * 1e-4, labels_T, cap=cap, group=None, first_token=0
    )[3]
    assert weight_grad.sum(dim=0).norm() <= 1e-4 * weight_grad.norm()


@pytest.mark.parametrize("cap", [None, 50.0, 200.0], ids="cap {}".format)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_logits_of_either_sign_have_finite_gradients(cross_entropy, device, cap, sign):
    hidden_TD, weight_VD = torch.full((3, 8), 100.0, device=device), torch.full((65, 8), 100.0, device=device) * sign
    weight_VD[7] *= -1
    labels_T = torch.tensor([7, 8, IGNORED_LABEL], device=device)
    results = losses_and_gradients(cross_entropy, hidden_TD, weight_VD, labels_T, cap=cap, group=None, first_token=0)
    wanted = losses_and_gradients(reference.cross_entropy, hidden_TD.double(), weight_VD.double(), labels_T, cap=cap)
    assert_near(results, wanted, torch.float32)


def test_a_label_that_no_rank_has_makes_the_loss_nan(cross_entropy, device):
    hidden_TD, weight_VD, _ = (x.to(device) for x in make_inputs(4, 24, 65))
    labels_T = torch.tensor([0, 64, 65, -1], device=device)
    _, losses_T = cross_entropy(hidden_TD, weight_VD, labels_T, multiplier=1.0, cap=50.0, group=None, first_token=0)
    assert losses_T.isnan().tolist() == [False, False, True, True]


def test_only_the_gradients_are_kept(cross_entropy, device):
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(40, 16, 65))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy(
            hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T,
            multiplier=1.0, cap=50.0, group=None, first_token=0,
        )  # fmt: skip
    assert sum(x.untyped_storage().nbytes() for x in kept) == 4 * (hidden_TD.numel() + weight_VD.numel())


def test_a_second_backward_pass_is_refused(cross_entropy, device):
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(63, 24, 65))
    loss_sum, _ = cross_entropy(
        hidden_TD.requires_grad_(), weight_VD, labels_T, multiplier=1.0, cap=50.0, group=None, first_token=0
    )
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


def test_it_runs_on_fake_tensors_and_its_matmuls_are_counted():
    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        hidden_TD, weight_VD = torch.empty(40, 64, requires_grad=True), torch.empty(4096, 64, requires_grad=True)
        labels_T = torch.empty(40, dtype=torch.int64)
        loss_sum, _ = torch_ops.cross_entropy(
            hidden_TD, weight_VD, labels_T, multiplier=1.0, cap=50.0, group=None, first_token=0
        )
        loss_sum.backward()
    assert flops.get_total_flops() == 6 * 40 * 64 * 4096


def test_a_chunk_has_a_cache_of_logits_and_enough_tokens(monkeypatch):
    monkeypatch.undo()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert torch_ops.chunk_tokens(4096, 512, cpu) == 2048
    assert torch_ops.chunk_tokens(4096, 32768, cpu) == 512
    assert torch_ops.chunk_tokens(8192, 131072 // 8, gpu) == 4096
    assert torch_ops.chunk_tokens(8192, 131072, gpu) == 2048
    assert torch_ops.chunk_tokens(513, 32768, cpu) == 257
    assert torch_ops.chunk_tokens(0, 32768, cpu) == 1


@pytest.mark.parametrize("cap", [None, 50.0, 200.0], ids="cap {}".format)
def test_triton_writes_narrow_gradients_as_torch_does(device, cap):
    """What a GPU does with bf16, whose matmul Triton's interpreter and a CPU cannot follow; on fp16."""
    kernel = pytest.importorskip("megagrok.kernels.cross_entropy.kernel")
    head = torch_ops.Head(MULTIPLIER, cap, None, 0)
    hidden_TD, weight_VD, labels_T = (x.to(device) for x in make_inputs(30, 16, 5000))
    labels = torch_ops.make_labels(labels_T, head, 5000)
    raw_Cv = torch.mm(hidden_TD, weight_VD.t()) * torch_ops.raw_factor(head)
    want, got = (middle(raw_Cv.clone(), labels, head, torch.float16) for middle in (torch_ops.middle, kernel.middle))
    assert want.scale_C is got.scale_C is None
    assert got.gradient_Cv.dtype == want.gradient_Cv.dtype == torch.float16
    assert_near([got.losses_C, got.gradient_Cv], [want.losses_C.double(), want.gradient_Cv.double()], torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight_vD": torch.ones(9, 5)}, ShapeError, r"hidden_TD is \[3, 4\] and weight_vD \[9, 5\]"),
        ({"weight_vD": torch.ones(0, 4)}, ShapeError, "v at least 1"),
        ({"labels_T": torch.zeros(2, dtype=torch.int64)}, ShapeError, r"labels_T is \[2\]; 3 tokens have \[3\]"),
        ({"labels_T": torch.zeros(3, dtype=torch.int32)}, KernelError, "labels are torch.int64"),
        ({"weight_vD": torch.ones(9, 4).bfloat16()}, KernelError, "of one float dtype"),
        ({"cap": 0.0}, KernelError, "cap is 0.0; a soft-cap is above 0, or None"),
    ],
    ids=["hidden", "no rows", "labels", "label dtype", "dtypes", "cap"],
)
def test_what_it_cannot_take_it_refuses(cross_entropy, change, error, text):
    arguments = {"hidden_TD": torch.ones(3, 4), "weight_vD": torch.ones(9, 4), "labels_T": torch.tensor([0, 1, 2])}
    rest = {"multiplier": 1.0, "cap": 50.0, "group": None, "first_token": 0}
    with pytest.raises(error, match=text):
        cross_entropy(**(arguments | rest | change))


def test_triton_refuses_logits_that_are_not_fp32():
    cross_entropy = choose_cross_entropy("triton", torch.device("cpu"))
    hidden_TD, weight_vD = torch.ones(3, 4).double(), torch.ones(9, 4).double()
    with pytest.raises(KernelError, match="takes contiguous rows of torch.float32, not torch.float64"):
        cross_entropy(
            hidden_TD, weight_vD, torch.tensor([0, 1, 2]), multiplier=1.0, cap=50.0, group=None, first_token=0
        )


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(cross_entropy, device):
    hidden_TD, weight_VD = torch.zeros(5, 8, device=device), torch.ones(1000, 8, device=device)
    labels_T = torch.arange(5, device=device)
    _, losses_T = cross_entropy(hidden_TD, weight_VD, labels_T, multiplier=1.0, cap=50.0, group=None, first_token=0)
    assert losses_T.tolist() == pytest.approx([math.log(1000)] * 5, rel=1e-6)
