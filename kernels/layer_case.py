"""The whole MoE layer on one rank as a race: its shapes, the values that all contenders share, ours, and the floor.

Every contender is given the same x, router and experts, routes alike and computes the same function; none takes part
whose result differs (bench.py). A layer's run is forward and backward from a given gradient of its output, gradients of
x and of all weights, fresh each time; no balance or z-loss takes part.
"""

# T tokens, D hidden, E experts, K top-k, F expert width, R = T * K rows

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagrok.kernels.experts import choose_experts
from megagrok.kernels.router import choose_router
from megagrok.kernels.timing import Run


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one layer, and whether its routing is skewed."""

    tokens: int
    hidden: int
    num_experts: int
    top_k: int
    width: int
    is_skewed: bool = False
    """Every second token, and no other, has expert 0 among its K; else as a random router has it."""

    def in_words(self) -> str:
        """As the table shows it."""
        skew = ", half of the tokens to one expert" if self.is_skewed else ""
        experts = f"{self.num_experts} experts top-{self.top_k} width {self.width}"
        return f"{self.tokens} tokens, hidden {self.hidden}, {experts}{skew}"

    @property
    def expert_flops(self) -> float:
        """Forward and backward: three matmuls where the forward pass has one."""
        return 3.0 * 2 * self.tokens * self.top_k * 3 * self.hidden * self.width

    @property
    def flops(self) -> float:
        """With the router's."""
        return self.expert_flops + 3.0 * 2 * self.tokens * self.hidden * self.num_experts

    def least_bytes(self, size: int) -> float:
        """What has to move: weights twice and their gradients once; x, result and both gradients; pre-activations
        written once and read once. `size`: bytes of an element."""
        weights = 3 * self.num_experts * 3 * self.hidden * self.width
        tokens = 5 * self.tokens * self.hidden
        return float(size * (weights + tokens + 2 * self.tokens * self.top_k * 2 * self.width))

    def least_saved_bytes(self, size: int) -> float:
        """x, gate-up pre-activations, and for each choice a source (int64) and a weight (fp32)."""
        rows = self.tokens * self.top_k
        return float(size * (self.tokens * self.hidden + rows * 2 * self.width) + rows * 12)


@dataclass(frozen=True, slots=True)
class LayerValues:
    """What all contenders start from. Weights are copied by those who change their layout."""

    shape: LayerShape
    x_TD: Tensor
    grad_TD: Tensor
    """Of the layer's result."""
    router_ED: Tensor
    gate_up_EFD: Tensor
    """[E, 2F, D], the gate's rows first."""
    down_EDF: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """A contender, made: what it trains, and its forward pass over [T, D]."""

    parameters: Sequence[nn.Parameter]
    forward: Callable[[Tensor], Tensor]


MakeLayer = Callable[[LayerValues], Layer]


def make_values(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> LayerValues:
    """The same values in every run. Skew is made by the first feature: +16 in every second token and -16 in the others,
    which the router's row of expert 0 alone reads, with weight 1."""
    generator = torch.Generator(device).manual_seed(5)

    def randn(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator).mul_(std).to(dtype)

    x_TD = randn(shape.tokens, shape.hidden)
    router_ED = randn(shape.num_experts, shape.hidden, std=shape.hidden**-0.5)
    if shape.is_skewed:
        x_TD[:, 0] = -16
        x_TD[::2, 0] = 16
        router_ED[:, 0] = 0
        router_ED[0, 0] = 1
    return LayerValues(
        shape=shape,
        x_TD=x_TD,
        grad_TD=randn(shape.tokens, shape.hidden),
        router_ED=router_ED,
        gate_up_EFD=randn(shape.num_experts, 2 * shape.width, shape.hidden, std=shape.hidden**-0.5),
        down_EDF=randn(shape.num_experts, shape.hidden, shape.width, std=shape.width**-0.5),
    )


def our_layer(values: LayerValues, router: str = "auto", experts: str = "auto") -> Layer:
    """What megagrok's model does on one expert rank: route, sort the choices by expert, mix the experts."""
    device, top_k = values.x_TD.device, values.shape.top_k
    route, mix_experts = choose_router(router, device), choose_experts(experts, device)
    weights = [nn.Parameter(tensor) for tensor in (values.router_ED, values.gate_up_EFD, values.down_EDF)]
    router_ED, gate_up_EFD, down_EDF = weights

    def forward(x_TD: Tensor) -> Tensor:
        routed = route(x_TD, router_ED, cap=None, top_k=top_k, scores="softmax", renormalize=True)
        order_R = routed.experts_TK.flatten().argsort(stable=True)
        weight_R = routed.weights_TK.flatten().index_select(0, order_R)
        rows_per_expert = routed.tokens_per_expert_E.tolist()
        return mix_experts(x_TD, order_R // top_k, weight_R, rows_per_expert, gate_up_EFD, down_EDF)

    return Layer(weights, forward)


def forward_backward(layer: Layer, values: LayerValues) -> Run:
    """The run of a layer."""
    x_TD = values.x_TD.clone().requires_grad_()

    def run() -> None:
        x_TD.grad = None
        for parameter in layer.parameters:
            parameter.grad = None
        torch.autograd.backward(layer.forward(x_TD), values.grad_TD)

    return run


def plain_matmuls(values: LayerValues) -> Run:
    """The floor: R rows through one expert's two matmuls and the four of their gradients, and nothing between them."""
    shape = values.shape
    gate_up_FD, down_DF = values.gate_up_EFD[0], values.down_EDF[0]
    x_RD = values.x_TD.repeat(shape.top_k, 1)
    a_RF = x_RD @ gate_up_FD[: shape.width].t()

    def run() -> None:
        # Each result is dropped at once, as the next one needs the memory.
        h_RF = x_RD @ gate_up_FD.t()
        y_RD = a_RF @ down_DF.t()
        _ = y_RD @ down_DF
        _ = y_RD.t() @ a_RF
        _ = h_RF @ gate_up_FD
        _ = h_RF.t() @ x_RD

    return run


def differs(layer: Layer, ours: Layer, values: LayerValues) -> str | None:
    """What tells the layer's result or its gradient of x from ours, as a sentence; None if nothing does."""
    # In bf16 others score a token's experts in bf16, so near ties are decided otherwise.
    tolerance = 1e-4 if values.x_TD.dtype == torch.float32 else 0.15
    for name, theirs, wanted in zip(
        ("result", "gradient of x"), _once(layer, values), _once(ours, values), strict=True
    ):
        error = float((theirs.float() - wanted.float()).norm() / wanted.float().norm())
        if not error <= tolerance:
            return f"its {name} differs from ours by {error:.1e} of the norm, more than {tolerance:.0e}"
    return None


def _once(layer: Layer, values: LayerValues) -> tuple[Tensor, Tensor]:
    x_TD = values.x_TD.clone().requires_grad_()
    y_TD = layer.forward(x_TD)
    (grad_TD,) = torch.autograd.grad(y_TD, x_TD, values.grad_TD)
    return y_TD.detach(), grad_TD
