"""What the bench races: the cases of each operation's own folder, the whole layer, and on a GPU the shapes that others
published or that Grok-2 has.

Peers of the layer have to compute what ours computes; that is checked at a small size before they are timed.
"""

# s positions, b micro-batch, h query heads, g kv heads, c head width, v vocabulary, T tokens, D hidden

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from megagrok.errors import KernelError
from megagrok.kernels.attention import choose_attention
from megagrok.kernels.attention.bench_attention import causal_flops
from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.cross_entropy import choose_cross_entropy
from megagrok.kernels.layer_case import (
    LayerShape,
    MakeLayer,
    differs,
    forward_backward,
    make_values,
    our_layer,
    plain_matmuls,
)
from megagrok.kernels.peers import ATTENTIONS, ENTROPIES, LAYERS, Attend, Entropy
from megagrok.kernels.timing import Case, Run

LAYER = "layer"
OPS = (LAYER, *IMPLEMENTATIONS)
FLOORS = ("plain matmuls",)
OURS = "megagrok"

CPU_LAYERS = (
    LayerShape(4096, 512, 8, 2, 1024),
    LayerShape(4096, 512, 64, 8, 128),
    LayerShape(4096, 512, 8, 2, 1024, is_skewed=True),
    LayerShape(4096, 1024, 8, 2, 2720),
)
GPU_LAYERS = (
    # SonicMoE's (arXiv:2512.14080, Fig. 14).
    LayerShape(24576, 1536, 128, 8, 256),
    LayerShape(24576, 1536, 32, 2, 1024),
    LayerShape(32768, 4096, 256, 16, 256),
    LayerShape(32768, 4096, 64, 4, 1024),
    # Grok-2's, its experts' width over eight tensor ranks.
    LayerShape(8192, 8192, 8, 2, 2720),
    LayerShape(32768, 8192, 8, 2, 2720),
    LayerShape(8192, 8192, 8, 2, 2720, is_skewed=True),
)


@dataclass(frozen=True, slots=True)
class Field:
    """A case, and who could not take part."""

    case: Case
    absent: dict[str, str]
    """Name -> why."""


def needs(op: str) -> tuple[str, ...]:
    """Folders whose tests have to be green before the operation is timed."""
    return ("router", "experts") if op == LAYER else (op,)


def fields(op: str, device: torch.device) -> list[Field]:
    """All races of an operation. Raises KernelError if its folder has no bench yet."""
    if op == LAYER:
        return [_layer_field(shape, device) for shape in (GPU_LAYERS if device.type == "cuda" else CPU_LAYERS)]
    module = f"megagrok.kernels.{op}.bench_{op}"
    if find_spec(module) is None:
        raise KernelError(f"kernels/{op} has no bench_{op}.py.")
    found = [Field(case, {}) for case in import_module(module).contenders(device)]
    if device.type == "cuda" and op == "attention":
        found += [attention_field(s, 16384, cap, device) for s in (2048, 4096, 8192) for cap in (30.0, None)]
    if device.type == "cuda" and op == "cross_entropy":
        found.append(entropy_field(8192, 8192, 131072 // 8, device))
    return found


def _layer_field(shape: LayerShape, device: torch.device) -> Field:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    makers: dict[str, MakeLayer] = {OURS: our_layer}
    if device.type == "cuda":
        for name in IMPLEMENTATIONS["experts"]:
            makers[f"{OURS}, {name} experts"] = partial(our_layer, experts=name)
    absent: dict[str, str] = {}
    for name, peer in LAYERS.items():
        why_not = peer.why_not(device)
        if why_not is None:
            makers[name] = peer.make
        else:
            absent[name] = why_not

    def make(name: str) -> Run:
        if name in LAYERS:
            _check_agreement(makers[name], shape, device, dtype)
        values = make_values(shape, device, dtype)
        return forward_backward(makers[name](values), values)

    makes: dict[str, Callable[[], Run]] = {name: partial(make, name) for name in makers}
    makes["plain matmuls"] = lambda: plain_matmuls(make_values(shape, device, dtype))
    size = dtype.itemsize
    return Field(Case(LAYER, shape.in_words(), shape.flops, shape.least_bytes(size), makes), absent)


def _check_agreement(maker: MakeLayer, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> None:
    """Fewer tokens and narrower experts of the same routing. Raises KernelError."""
    small = make_values(replace(shape, tokens=min(256, shape.tokens), width=min(256, shape.width)), device, dtype)
    difference = differs(maker(small), our_layer(small), small)
    if difference is not None:
        raise KernelError(difference)


def attention_field(num_positions: int, num_tokens: int, cap: float | None, device: torch.device) -> Field:
    """Grok-2's heads: 48 for queries, 8 for keys and values, width 128; samples of so many positions."""
    batch, heads, kv_heads, width = num_tokens // num_positions, 48, 8, 128

    def inputs(*order: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [(batch, count, num_positions, width) for count in (heads, kv_heads, kv_heads)]
        q, k, v = (torch.randn(*size, device=device, dtype=torch.bfloat16).permute(order) for size in sizes)
        return q.contiguous().requires_grad_(), k.contiguous().requires_grad_(), v.contiguous().requires_grad_()

    def ours(name: str) -> Run:
        attend = choose_attention(name, device)
        q, k, v = inputs(2, 0, 1, 3)
        grad = torch.randn(num_positions, batch, heads * width, device=device, dtype=torch.bfloat16)

        def run() -> None:
            q.grad = k.grad = v.grad = None
            torch.autograd.backward(attend(q, k, v, cap=cap), grad)

        return run

    def theirs(attend: Attend) -> Run:
        q, k, v = inputs(0, 1, 2, 3)
        grad = torch.randn_like(q)

        def run() -> None:
            q.grad = k.grad = v.grad = None
            torch.autograd.backward(attend(q, k, v, cap), grad)

        return run

    makes: dict[str, Callable[[], Run]] = {name: partial(ours, name) for name in IMPLEMENTATIONS["attention"]}
    absent: dict[str, str] = {}
    for name, peer in ATTENTIONS.items():
        why_not = "has no cap" if cap is not None and name == "torch sdpa" else peer.why_not(device)
        if why_not is None:
            makes[name] = partial(theirs, peer.make)
        else:
            absent[name] = why_not
    flops = causal_flops(batch, heads, num_positions, width)
    words = f"{num_positions} positions x {batch}, {heads} query and {kv_heads} kv heads of {width}, "
    return Field(Case("attention", words + ("no cap" if cap is None else f"cap {cap:g}"), flops, 0.0, makes), absent)


def entropy_field(tokens: int, hidden: int, vocabulary: int, device: torch.device) -> Field:
    """With Grok-2's cap; `vocabulary`: this rank's part of it."""
    multiplier, cap = hidden**-0.5, 50.0

    def inputs() -> tuple[torch.Tensor, nn.Parameter, torch.Tensor]:
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = nn.Parameter(torch.randn(vocabulary, hidden, device=device, dtype=torch.bfloat16))
        return x, weight, torch.randint(vocabulary, (tokens,), device=device)

    def ours(name: str) -> Run:
        entropy = choose_cross_entropy(name, device)
        x, weight, labels = inputs()

        def run() -> None:
            x.grad = weight.grad = None
            loss_sum, _ = entropy(x, weight, labels, multiplier=multiplier, cap=cap, group=None, first_token=0)
            torch.autograd.backward(loss_sum)

        return run

    def theirs(entropy: Entropy) -> Run:
        x, weight, labels = inputs()

        def run() -> None:
            x.grad = weight.grad = None
            torch.autograd.backward(entropy(x, weight, labels, multiplier, cap))

        return run

    makes: dict[str, Callable[[], Run]] = {name: partial(ours, name) for name in IMPLEMENTATIONS["cross_entropy"]}
    absent: dict[str, str] = {}
    for name, peer in ENTROPIES.items():
        why_not = peer.why_not(device)
        if why_not is None:
            makes[name] = partial(theirs, peer.make)
        else:
            absent[name] = why_not
    words = f"{tokens} tokens, hidden {hidden}, {vocabulary} of the vocabulary, cap {cap:g}"
    return Field(Case("cross_entropy", words, 3.0 * 2 * tokens * hidden * vocabulary, 0.0, makes), absent)
