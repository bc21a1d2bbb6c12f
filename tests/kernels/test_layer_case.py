"""All who race on the layer compute the same thing, and route as the shape says."""

import torch
from torch import nn

from megagrok.kernels.layer_case import Layer, LayerShape, differs, make_values, our_layer
from megagrok.kernels.peers import LAYERS
from megagrok.platform import CPU
from tests.ranks import run_ranks

PLAIN = LayerShape(96, 32, 8, 2, 16)
FINE = LayerShape(96, 32, 16, 4, 16)
SKEWED = LayerShape(96, 32, 8, 2, 16, is_skewed=True)
HERE = [name for name, peer in LAYERS.items() if peer.why_not(CPU.device) is None]


def differences(_ranks: object) -> dict[str, str | None]:
    """Made on a rank, as the peers ask for process groups."""
    found = {}
    for shape in (PLAIN, FINE, SKEWED):
        values = make_values(shape, CPU.device, torch.float32)
        for name in HERE:
            found[f"{name}: {shape.in_words()}"] = differs(LAYERS[name].make(values), our_layer(values), values)
    return found


def test_a_peer_computes_what_ours_does_and_so_does_its_gradient() -> None:
    (found,) = run_ranks(differences, 1)
    assert len(found) == 3 * len(HERE)
    assert found == dict.fromkeys(found)


def test_every_peer_of_a_cpu_takes_part_here() -> None:
    assert [name for name, peer in LAYERS.items() if not peer.needs_gpu] == HERE


def test_a_layer_that_computes_something_else_is_told_apart() -> None:
    values = make_values(PLAIN, CPU.device, torch.float32)
    ours = our_layer(values)
    doubled = Layer(ours.parameters, lambda x_TD: 2 * ours.forward(x_TD))
    assert "result differs from ours" in (differs(doubled, ours, values) or "")

    def without_gradient_of_half(x_TD: torch.Tensor) -> torch.Tensor:
        return ours.forward((x_TD + x_TD.detach()) / 2)

    assert "gradient of x differs" in (differs(Layer([], without_gradient_of_half), ours, values) or "")


def test_skew_sends_half_of_the_tokens_to_one_expert() -> None:
    values = make_values(SKEWED, CPU.device, torch.float32)
    chosen_TK = (values.x_TD @ values.router_ED.t()).topk(SKEWED.top_k).indices
    assert (chosen_TK == 0).any(dim=1).tolist() == [True, False] * 48


def test_values_are_the_same_in_every_run() -> None:
    one, other = (make_values(PLAIN, CPU.device, torch.float32) for _ in range(2))
    assert torch.equal(one.x_TD, other.x_TD)
    assert torch.equal(one.down_EDF, other.down_EDF)


def test_a_peer_that_needs_a_gpu_or_is_not_installed_says_so() -> None:
    assert LAYERS["SonicMoE"].why_not(CPU.device) in (
        "not installed: sonicmoe",
        "needs an NVIDIA GPU; the device is cpu",
    )


def test_the_least_that_a_layer_keeps_is_x_and_pre_activations_and_routing() -> None:
    rows = 96 * 2
    assert PLAIN.least_saved_bytes(4) == 96 * 32 * 4 + rows * 2 * 16 * 4 + rows * (8 + 4)
    assert PLAIN.expert_flops == 3 * (2 * rows * 32 * 32 + 2 * rows * 16 * 32)
    assert isinstance(our_layer(make_values(PLAIN, CPU.device, torch.float32)).parameters[0], nn.Parameter)
