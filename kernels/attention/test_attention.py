"""Attention, of every implementation: results and gradients are the specification's, at ragged sizes too."""

# s queries, S keys, b micro-batch, h query heads, g kv heads, c head width

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megagrok.errors import KernelError
from megagrok.kernels.attention import Attention, choose_attention
from megagrok.kernels.attention.reference import attention as reference

Positions = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """In fp64, of values that the narrow dtype can hold, so that only the implementation's own rounding is seen."""

    q_sbhc: Tensor
    k_Sbgc: Tensor
    v_Sbgc: Tensor
    grad_sbX: Tensor

    def run(self, attention: Attention, dtype: torch.dtype, device: torch.device, **how: object) -> list[Tensor]:
        """Result and the gradients of q, k, v, in fp64 on the CPU."""
        q, k, v = (x.to(device, dtype).requires_grad_() for x in (self.q_sbhc, self.k_Sbgc, self.v_Sbgc))
        result = attention(q, k, v, **how)  # type: ignore[arg-type]
        assert result.dtype == dtype
        grads = torch.autograd.grad(result, (q, k, v), self.grad_sbX.to(device, dtype))
        return [x.detach().double().cpu() for x in (result, *grads)]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """So that a place which an implementation forgets to write cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Attention:
    return choose_attention(request.param, device)


def _inputs(s: int, S: int, *, b: int = 1, h: int = 2, g: int = 1, c: int = 16, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(s + S)
    shapes = (s, b, h, c), (S, b, g, c), (S, b, g, c), (s, b, h * c)
    # Scores of some tens, so that a cap of 30 bends them.
    scales = 4, 4, 1, 1
    return Inputs(
        *(torch.randn(*shape).mul(scale).to(dtype).double() for shape, scale in zip(shapes, scales, strict=True))
    )


def _check(attention: Attention, inputs: Inputs, device: torch.device, tolerance: float, **how: object) -> None:
    dtype = torch.float32 if tolerance < 1e-3 else torch.bfloat16
    on_device = {name: _to(value, device) for name, value in how.items()}
    expected = inputs.run(reference, torch.float64, torch.device("cpu"), **how)
    ours = inputs.run(attention, dtype, device, **on_device)
    for name, x, true in zip(("result", "q", "k", "v"), ours, expected, strict=True):
        assert x.shape == true.shape
        if true.numel():
            # Of the largest; or of 0.5, where the true gradient of q and k is nearly or wholly 0.
            error = float((x - true).abs().max()) / max(float(true.abs().max()), 0.5)
            assert error <= tolerance, f"{name}: {error:.1e} of its largest"


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_to(x, device) for x in value) if isinstance(value, tuple) else value


def _temperature(positions_s: Tensor) -> Tensor:
    return positions_s.clamp(min=8).float().log2() / 3


@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("s", [0, 1, 63, 150])
def test_result_and_gradients_are_those_of_the_specification(
    implementation: Attention, device: torch.device, s: int, cap: float | None
) -> None:
    inputs = _inputs(s, s, b=2, h=2, g=1, dtype=torch.float32)
    _check(implementation, inputs, device, 5e-5, cap=cap, tau_s=None)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_each_query_has_a_temperature_of_its_own(
    implementation: Attention, device: torch.device, cap: float | None
) -> None:
    _check(
        implementation,
        _inputs(70, 70, dtype=torch.float32),
        device,
        5e-5,
        cap=cap,
        tau_s=_temperature(torch.arange(70)),
    )


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_query_heads_share_the_kv_head_of_their_group(
    implementation: Attention, device: torch.device, heads: tuple[int, int]
) -> None:
    h, g = heads
    _check(implementation, _inputs(33, 33, h=h, g=g, c=24, dtype=torch.float32), device, 5e-5, cap=30.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_positions_say_which_keys_a_query_may_see(implementation: Attention, device: torch.device, rank: int) -> None:
    # Two ranks that share 80 positions as context parallelism does: the outer and the inner chunks.
    first, second, third, fourth = torch.arange(80).chunk(4)
    parts = torch.cat([first, fourth]), torch.cat([second, third])
    positions = parts[rank], torch.cat(parts)
    inputs = _inputs(40, 80, dtype=torch.float32)
    _check(implementation, inputs, device, 5e-5, cap=30.0, tau_s=_temperature(parts[rank]), positions=positions)


def test_a_later_key_changes_nothing(implementation: Attention, device: torch.device) -> None:
    inputs = _inputs(90, 90, dtype=torch.float32)
    q, k, v = (x.to(device, torch.float32) for x in (inputs.q_sbhc, inputs.k_Sbgc, inputs.v_Sbgc))
    before = implementation(q, k, v, cap=30.0)
    k[50:], v[50:] = 1e4, 1e4
    after = implementation(q, k, v, cap=30.0)
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50:], after[50:])


@pytest.mark.parametrize("cap", [None, 30.0, 1000.0])
def test_scores_beyond_what_exp_can_hold_stay_finite(
    implementation: Attention, device: torch.device, cap: float | None
) -> None:
    inputs = _inputs(40, 40, dtype=torch.float32)
    inputs.q_sbhc.mul_(30)
    _check(implementation, inputs, device, 1e-3 - 1e-9, cap=cap)


def test_a_view_into_a_larger_tensor_is_read_as_it_lies(implementation: Attention, device: torch.device) -> None:
    inputs = _inputs(20, 20, h=4, g=2, c=16, dtype=torch.float32)
    mixed_sbgX = torch.cat([inputs.q_sbhc.reshape(20, 1, 2, 32), inputs.k_Sbgc, inputs.v_Sbgc], dim=-1).to(
        device, torch.float32
    )
    q, k, v = mixed_sbgX[..., :32], mixed_sbgX[..., 32:48], mixed_sbgX[..., 48:]
    ours = implementation(q.reshape(20, 1, 4, 16), k, v, cap=30.0)
    whole = implementation(q.reshape(20, 1, 4, 16).contiguous(), k.contiguous(), v.contiguous(), cap=30.0)
    assert torch.equal(ours, whole)


def test_the_same_inputs_give_the_same_bits(implementation: Attention, device: torch.device) -> None:
    inputs = _inputs(65, 65, h=4, g=1, dtype=torch.float32)
    first, second = (inputs.run(implementation, torch.float32, device, cap=30.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("s", [1, 63, 1000])
@pytest.mark.parametrize("c", [64, 128])
def test_in_bf16_it_is_as_near_as_bf16_allows(name: str, s: int, c: int) -> None:
    device = torch.device("cuda")
    inputs = _inputs(s, s, h=4, g=2, c=c, dtype=torch.bfloat16)
    inputs.q_sbhc.div_(4), inputs.k_Sbgc.div_(4)
    _check(choose_attention(name, device), inputs, device, 2e-2, cap=30.0)


@pytest.mark.parametrize("s", [1, 63, 200])
def test_torch_in_bf16_is_as_near_as_bf16_allows(s: int) -> None:
    device = torch.device("cpu")
    inputs = _inputs(s, s, h=4, g=2, dtype=torch.bfloat16)
    inputs.q_sbhc.div_(4), inputs.k_Sbgc.div_(4)
    _check(choose_attention("torch", device), inputs, device, 2e-2, cap=30.0)


def test_torch_in_fp64_is_the_specification() -> None:
    device = torch.device("cpu")
    inputs = _inputs(150, 150, h=4, g=2, dtype=torch.float64)
    ours, true = (
        inputs.run(attention, torch.float64, device, cap=30.0)
        for attention in (choose_attention("torch", device), reference)
    )
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(ours, true, strict=True))


def test_torch_keeps_no_scores_for_the_backward_pass() -> None:
    s, h, c = 256, 4, 16
    q, k, v = (torch.randn(s, 1, heads, c, requires_grad=True) for heads in (h, 2, 2))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        choose_attention("torch", torch.device("cpu"))(q, k, v, cap=30.0)
    # q, k, v, the result, and one number of each query and head.
    assert sum(kept.values()) == 4 * (2 * q.numel() + 2 * k.numel() + s * h)


def test_torch_runs_on_tensors_that_hold_no_numbers_and_its_flops_are_counted() -> None:
    s, b, h, g, c = 256, 2, 4, 2, 16
    attention = choose_attention("torch", torch.device("cpu"))
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.randn(s, b, heads, c, requires_grad=True) for heads in (h, g, g))
        torch.autograd.backward(attention(q, k, v, cap=30.0, tau_s=torch.ones(s)).sum())
    # Two products forward and five backward, of runs of 64 queries and the keys up to their end.
    scores = b * h * 64 * (64 + 128 + 192 + 256)
    assert counter.get_total_flops() == 7 * 2 * scores * c


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[:, :, :3], k, v, {}), "3 query heads, need a multiple of the 2 kv heads"),
        (lambda q, k, v: (q[:5], k, v, {}), "5 queries and 8 keys without positions"),
        (lambda q, k, v: (q, k, v[:7], {}), r"k \[8, 1, 2, 16\] and v \[7, 1, 2, 16\]"),
        (lambda q, k, v: (q, k, v, {"tau_s": torch.ones(9)}), r"tau \[9\] of torch.float32, needs \[8\]"),
        (lambda q, k, v: (q, k, v, {"cap": -1.0}), "cap = -1.0, needs a number above 0, or None"),
        (lambda q, k, v: (q.half(), k, v, {}), "need one floating dtype"),
        (lambda q, k, v: (q[0], k, v, {}), r"needs \[positions, batch, heads, width\]"),
    ],
)
def test_other_shapes_are_refused_with_what_was_needed(
    implementation: Attention,
    device: torch.device,
    change: Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Any]]],
    said: str,
) -> None:
    q, k, v = (torch.randn(8, 1, heads, 16, device=device) for heads in (4, 2, 2))
    q, k, v, how = change(q, k, v)
    with pytest.raises(KernelError, match=said):
        implementation(q, k, v, **({"cap": 30.0} | how))
