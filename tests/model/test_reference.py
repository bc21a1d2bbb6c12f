"""Laws of the definition: it is the published maths, it is causal, its losses are sums, its gradients are right.

The first law compares it with a second definition, written in numpy float64 loops from the formulas alone.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from megagrok.config.schema import BalanceLoss, ModelConfig, MoEConfig
from megagrok.errors import DataError, ShapeError
from megagrok.model.loss import IGNORED_LABEL, balance_loss_sum, cross_entropy_sum, expert_load
from megagrok.model.names import parameter_shapes
from megagrok.model.reference import (
    Attention,
    Expert,
    Grok,
    Layer,
    RMSNorm,
    SparseMoE,
    accumulate,
    make_reference,
    rotate,
    temperature,
    training_loss_sum,
)

Array = npt.NDArray[np.float64]

# hidden != heads * head_dim and all widths differ, so that no two sizes can be mistaken for each other.
# Weights are large and caps small, so that every cap bends what passes through it.
GROK2 = ModelConfig(
    vocab_size=29,
    hidden=20,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    moe=MoEConfig(num_experts=5, top_k=2, ffn_hidden=11, residual_ffn_hidden=13, router_softcap=1.5),
    rope_theta=50.0,
    embedding_multiplier=math.sqrt(20),
    output_multiplier=0.5,
    attention_softcap=2.0,
    attention_temperature_positions=3,
    final_softcap=3.0,
    init_std=0.4,
)
SHAPE_286B = replace(
    GROK2,
    num_kv_heads=3,
    attention_temperature_positions=None,
    moe=MoEConfig(num_experts=4, top_k=3, ffn_hidden=11, router_softcap=1.5, renormalize_top_k=True),
)
GROK1 = replace(
    GROK2,
    tied_embeddings=True,
    final_softcap=None,
    attention_temperature_positions=None,
    output_multiplier=1 / math.sqrt(3),
    moe=MoEConfig(num_experts=5, top_k=2, ffn_hidden=11),
)
VARIANTS = {"grok2": GROK2, "286b": SHAPE_286B, "grok1": GROK1}
all_variants = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())


def make_grok(model: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 7) -> Grok:
    """A reference whose norm gains are not ones, so that a forgotten gain shows."""
    grok = make_reference(model, seed, dtype)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in grok.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=noise, dtype=torch.float64))
    return grok


def layers_of(grok: Grok) -> list[Layer]:
    return [layer for layer in grok.model.layers if isinstance(layer, Layer)]


def make_moe(moe: MoEConfig, dtype: torch.dtype) -> SparseMoE:
    return layers_of(make_reference(replace(GROK2, num_layers=1, moe=moe), 1, dtype))[0].block_sparse_moe


def make_tokens(model: ModelConfig, batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    return torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# The second definition. One sequence, one token, one head, one expert at a time.


def np_norm(x: Array, gain: Array, eps: float) -> Array:
    return x / math.sqrt(sum(value * value for value in x) / len(x) + eps) * gain


def np_cap(value: float, cap: float | None) -> float:
    return value if cap is None else cap * math.tanh(value / cap)


def np_gelu(value: float) -> float:
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def np_gated(x: Array, gate: Array, up: Array, down: Array) -> Array:
    inner = np.array([np_gelu(float(g @ x)) * float(u @ x) for g, u in zip(gate, up, strict=True)])
    return np.asarray(down @ inner)


def np_rope(x: Array, position: int, theta: float) -> Array:
    half = len(x) // 2
    turned = np.zeros_like(x)
    for i in range(half):
        pair = complex(x[i], x[i + half]) * np.exp(1j * position * theta ** (-2 * i / len(x)))
        turned[i], turned[i + half] = pair.real, pair.imag
    return turned


def np_attention(model: ModelConfig, weights: dict[str, Array], prefix: str, xs: list[Array]) -> list[Array]:
    width, group = model.head_dim, model.num_heads // model.num_kv_heads
    n = model.attention_temperature_positions
    outputs = []
    for i, x in enumerate(xs):
        heads = []
        for a in range(model.num_heads):
            rows, kv_rows = slice(a * width, (a + 1) * width), slice(a // group * width, (a // group + 1) * width)
            q = np_rope(weights[prefix + "q_proj.weight"][rows] @ x, i, model.rope_theta)
            tau = 1.0 if n is None or i <= n else math.log2(i) / math.log2(n)
            scores, values = [], []
            for j in range(i + 1):
                k = np_rope(weights[prefix + "k_proj.weight"][kv_rows] @ xs[j], j, model.rope_theta)
                scores.append(tau * np_cap(float(q @ k) / math.sqrt(width), model.attention_softcap))
                values.append(weights[prefix + "v_proj.weight"][kv_rows] @ xs[j])
            shares = np.exp(scores) / np.exp(scores).sum()
            heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        outputs.append(weights[prefix + "o_proj.weight"] @ np.concatenate(heads))
    return outputs


def np_router(model: ModelConfig, weights: dict[str, Array], prefix: str, x: Array) -> tuple[Array, list[int], float]:
    """Probabilities of all experts, the chosen ones, and logsumexp."""
    logits = np.array([np_cap(float(row @ x), model.moe.router_softcap) for row in weights[prefix + "gate.weight"]])
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: model.moe.top_k]
    return np.exp(logits) / np.exp(logits).sum(), chosen, math.log(np.exp(logits).sum())


def np_grok(
    model: ModelConfig, weights: dict[str, Array], tokens: list[int]
) -> tuple[Array, list[Array], Array, float]:
    """Logits [S, V]; router probabilities [S, E] of each layer; choices per expert [L, E]; z-loss sum."""
    eps, counts, z_sum = model.norm_eps, np.zeros((model.num_layers, model.moe.num_experts)), 0.0
    hs = [weights["model.embed_tokens.weight"][token] * model.embedding_multiplier for token in tokens]
    probabilities = []
    for layer in range(model.num_layers):
        p = f"model.layers.{layer}."
        xs = [np_norm(h, weights[p + "pre_attn_norm.weight"], eps) for h in hs]
        os = np_attention(model, weights, p + "self_attn.", xs)
        hs = [h + np_norm(o, weights[p + "post_attn_norm.weight"], eps) for h, o in zip(hs, os, strict=True)]
        probabilities.append(np.zeros((len(tokens), model.moe.num_experts)))
        for t, h in enumerate(hs):
            x = np_norm(h, weights[p + "pre_moe_norm.weight"], eps)
            probability, chosen, logsumexp = np_router(model, weights, p + "block_sparse_moe.", x)
            probabilities[layer][t], z_sum = probability, z_sum + logsumexp**2
            scale = sum(probability[e] for e in chosen) if model.moe.renormalize_top_k else 1.0
            y = np.zeros(model.hidden)
            for e in chosen:
                w1, w3, w2 = (weights[f"{p}block_sparse_moe.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
                y += probability[e] / scale * np_gated(x, w1, w3, w2)
                counts[layer, e] += 1
            if model.moe.residual_ffn_hidden is not None:
                gate, up, down = (weights[f"{p}mlp.{w}_proj.weight"] for w in ("gate", "up", "down"))
                y = (y + np_gated(x, gate, up, down)) / math.sqrt(2)
            hs[t] = h + np_norm(y, weights[p + "post_moe_norm.weight"], eps)
    head = weights["model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"]
    finals = [head @ np_norm(h, weights["model.norm.weight"], eps) * model.output_multiplier for h in hs]
    logits = np.array([[np_cap(float(value), model.final_softcap) for value in row] for row in finals])
    return logits, probabilities, counts, z_sum


@all_variants
def test_the_forward_pass_is_the_published_maths(model: ModelConfig) -> None:
    grok, tokens = make_grok(model), make_tokens(model)
    load_LE = expert_load(1 + make_tokens(model, model.num_layers, model.moe.num_experts))
    with torch.no_grad():
        output = grok(tokens, load_LE=load_LE)
    weights = {name: value.numpy() for name, value in grok.state_dict().items()}
    counts, z_sum, balance_sum = np.zeros((model.num_layers, model.moe.num_experts)), 0.0, 0.0
    for b, sequence in enumerate(tokens.tolist()):
        logits, probabilities, sequence_counts, sequence_z_sum = np_grok(model, weights, sequence)
        # fp64 rounding (1e-16) times reduction lengths (tens) times the gain of two layers stays far below 1e-11.
        np.testing.assert_allclose(output.logits_BSV[b].numpy(), logits, rtol=0, atol=1e-11)
        counts, z_sum = counts + sequence_counts, z_sum + sequence_z_sum
        for layer_load, layer_probabilities in zip(load_LE.tolist(), probabilities, strict=True):
            for row in layer_probabilities:
                balance_sum += len(row) * sum(f * p for f, p in zip(layer_load, row, strict=True))
    assert np.array_equal(output.tokens_per_expert_LE.numpy(), counts)
    assert output.z_sum.item() == pytest.approx(z_sum, rel=1e-12)
    assert output.balance_sum.item() == pytest.approx(balance_sum, rel=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_softcap": None},
        {"attention_temperature_positions": None},
        {"final_softcap": None},
        {"rope_theta": 60.0},
        {"embedding_multiplier": 1.0},
        {"output_multiplier": 0.6},
        {"norm_eps": 1e-2},
        {"moe": replace(GROK2.moe, router_softcap=None)},
        {"moe": replace(GROK2.moe, renormalize_top_k=True)},
        {"moe": replace(GROK2.moe, top_k=3)},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_setting_of_the_architecture_bites(change: dict[str, object]) -> None:
    """Otherwise the comparison above would not notice it missing on both sides."""
    tokens = make_tokens(GROK2)
    changed = replace(GROK2, **change)  # type: ignore[arg-type]
    difference = make_grok(changed)(tokens).logits_BSV - make_grok(GROK2)(tokens).logits_BSV
    assert difference.abs().max() > 1e-3


@all_variants
def test_the_state_dict_is_the_list_of_global_names(model: ModelConfig) -> None:
    state = make_grok(model).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == parameter_shapes(model)
    assert sum(value.numel() for value in state.values()) == sum(map(math.prod, parameter_shapes(model).values()))


@all_variants
def test_changing_a_token_never_changes_earlier_logits(model: ModelConfig) -> None:
    grok, tokens = make_grok(model), make_tokens(model, batch=1)
    before = grok(tokens).logits_BSV
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % model.vocab_size
        after = grok(changed).logits_BSV
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
        assert (after[:, position:] - before[:, position:]).abs().amax(dim=-1).min() > 1e-6


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    grok, tokens = make_grok(GROK2), make_tokens(GROK2, batch=3)
    alone = torch.cat([grok(sequence[None]).logits_BSV for sequence in tokens])
    torch.testing.assert_close(grok(tokens).logits_BSV, alone, rtol=0, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    noise = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 8, generator=noise, dtype=torch.float64)
    everywhere = rotate(torch.stack([q, k])[:, None, None, :].expand(2, 40, 1, 8), theta=100.0)
    scores = torch.einsum("qc,kc->qk", everywhere[0, :, 0], everywhere[1, :, 0])
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    torch.testing.assert_close(everywhere[0, 0, 0], q)
    assert scores.diagonal(1)[0] != pytest.approx(scores.diagonal(-1)[0].item())


def test_rotary_angles_of_far_positions_are_exact_to_the_dtype() -> None:
    last, theta = 131071, 208533496.0
    turned = rotate(torch.ones(1, last + 1, 1, 128), theta)[0, last, 0]
    angles = [last * theta ** (-2 * i / 128) for i in range(64)]
    expected = [math.cos(a) - math.sin(a) for a in angles] + [math.cos(a) + math.sin(a) for a in angles]
    torch.testing.assert_close(turned, torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_temperature_is_one_up_to_its_start_and_grows_after() -> None:
    factors = temperature(20, 4)
    assert factors[:5].tolist() == [1.0] * 5
    assert factors[16].item() == pytest.approx(2.0)
    assert (factors[5:].diff() > 0).all()
    assert temperature(20, None).tolist() == [1.0] * 20


def route(config: MoEConfig, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of each expert's vote [T, E] and its choices [E], seen through experts that answer with unit vectors.

    Expert e is made to return gelu(1) * e_e for every x whose last entry is 1: what comes out is the vote itself.
    """
    moe = make_moe(config, torch.float64)
    answer = torch.nn.functional.gelu(torch.tensor(1.0, dtype=torch.float64), approximate="tanh").item()
    with torch.no_grad():
        moe.gate.weight.copy_(gate)
        for number, expert in enumerate(moe.experts):
            assert isinstance(expert, Expert)
            for matrix in (expert.w1.weight, expert.w3.weight, expert.w2.weight):
                matrix.zero_()
            expert.w1.weight[0, -1] = expert.w3.weight[0, -1] = 1.0
            expert.w2.weight[number, 0] = 1 / answer
        y, routing = moe(x, None)
    return y[:, : config.num_experts], routing.tokens_per_expert_E


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_token_visits_exactly_top_k_experts_each_once(top_k: int, renormalize: bool) -> None:
    config = replace(GROK2.moe, top_k=top_k, renormalize_top_k=renormalize, router_softcap=None)
    noise = torch.Generator().manual_seed(2)
    gate = torch.randn(5, 20, generator=noise, dtype=torch.float64)
    x = torch.randn(50, 20, generator=noise, dtype=torch.float64)
    x[:, -1] = 1
    votes, counts = route(config, gate, x)
    probabilities = (x @ gate.T).softmax(dim=-1)
    is_chosen = probabilities >= probabilities.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    expected = probabilities * is_chosen
    if renormalize:
        expected = expected / expected.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(votes.sum(dim=-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(votes, expected, rtol=0, atol=1e-12)
    assert torch.equal(counts, is_chosen.sum(dim=0))
    assert counts.sum() == 50 * top_k
    assert counts.max() <= 50


@all_variants
def test_experts_without_tokens_have_zero_gradients_and_all_others_finite_ones(model: ModelConfig) -> None:
    grok, tokens = make_grok(model), make_tokens(model)
    favourites = range(model.moe.num_experts - model.moe.top_k, model.moe.num_experts)
    with torch.no_grad():
        # A residual stream that stays positive, and a gate that adds it up for the favourites alone: all agree.
        grok.model.embed_tokens.weight.abs_().add_(0.1)
        for layer in layers_of(grok):
            layer.post_attn_norm.weight.fill_(1e-3)
            layer.post_moe_norm.weight.fill_(1e-3)
            layer.block_sparse_moe.gate.weight.zero_()
            layer.block_sparse_moe.gate.weight[favourites.start :] = 0.1
    totals = accumulate(grok, [tokens], [tokens], None)
    expected = torch.zeros(model.num_layers, model.moe.num_experts, dtype=torch.int64)
    expected[:, favourites.start :] = tokens.numel()
    assert torch.equal(totals.tokens_per_expert_LE, expected)
    for name, parameter in grok.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if ".experts." in name:
            is_favourite = int(name.split(".experts.")[1].split(".")[0]) in favourites
            assert bool(parameter.grad.any()) == is_favourite, name


MICRO = replace(
    GROK2,
    vocab_size=5,
    hidden=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    moe=replace(GROK2.moe, num_experts=3, ffn_hidden=2, residual_ffn_hidden=2, balance_coefficient=0.3),
)


@pytest.mark.parametrize("balance_loss", ["none", "micro_batch", "global_batch"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_the_slope_of_the_training_loss(tied: bool, balance_loss: BalanceLoss) -> None:
    moe = replace(MICRO.moe, balance_loss=balance_loss, z_loss_coefficient=0.2)
    model = replace(MICRO, tied_embeddings=tied, moe=moe)
    grok, tokens, labels = make_grok(model), make_tokens(model, 1, 4), make_tokens(model, 1, 4, seed=8)
    load_LE = expert_load(torch.tensor([[1, 2, 5], [4, 4, 0]]))
    names, values = zip(*grok.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        output = torch.func.functional_call(grok, named, (tokens,), {"load_LE": load_LE})
        return training_loss_sum(output, labels, model)

    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_balance_loss_is_one_a_token_under_uniform_use() -> None:
    p_TE, even_E = torch.full((7, 4), 0.25), torch.full((4,), 14)
    assert balance_loss_sum("micro_batch", p_TE.sum(0), even_E, None).item() == pytest.approx(7)
    assert balance_loss_sum("global_batch", p_TE.sum(0), even_E, None).item() == pytest.approx(7)
    assert balance_loss_sum("none", p_TE.sum(0), even_E, None).item() == 0


def test_the_balance_loss_of_one_taste_is_between_one_and_experts_over_top_k() -> None:
    """Where all tokens like the same experts, load and probability are ordered alike (Chebyshev's sum inequality)."""
    noise = torch.Generator().manual_seed(4)
    for sharpness in (0.0, 0.1, 1.0, 30.0):
        p_TE = (torch.randn(1, 6, generator=noise) * sharpness).softmax(dim=-1).expand(10, 6)
        counts_E = p_TE.topk(2, dim=-1).indices.flatten().bincount(minlength=6)
        loss = balance_loss_sum("micro_batch", p_TE.sum(0), counts_E, None).item()
        assert 10 * (1 - 1e-6) <= loss <= 10 * 6 / 2 * (1 + 1e-6)


def test_the_first_global_load_is_uniform() -> None:
    grok, tokens = make_grok(GROK2), make_tokens(GROK2)
    uniform = torch.full((2, 5), 0.2, dtype=torch.float64)
    assert grok(tokens).balance_sum.item() == pytest.approx(grok(tokens, load_LE=uniform).balance_sum.item())
    # Probabilities sum to one, so a uniform load makes every token cost one in each layer and pulls nowhere.
    assert grok(tokens).balance_sum.item() == pytest.approx(2 * tokens.numel())


def test_a_batch_may_be_cut_anywhere() -> None:
    """The layout law's root: sums over micro-batches, ragged labels and all, are the sums over the whole."""
    tokens, labels = make_tokens(GROK2, batch=6), make_tokens(GROK2, batch=6, seed=5)
    labels[0, :6] = labels[3, 2] = IGNORED_LABEL
    load_LE = expert_load(torch.tensor([[1, 2, 5, 1, 1], [4, 4, 0, 0, 2]]))
    whole = make_grok(GROK2)
    expected = accumulate(whole, [tokens], [labels], load_LE)
    assert expected.num_tokens == 6 * 9 - 7
    for sizes in ([3, 3], [1, 2, 3], [1] * 6):
        cut = make_grok(GROK2)
        totals = accumulate(cut, torch.split(tokens, sizes), torch.split(labels, sizes), load_LE)
        assert totals.num_tokens == expected.num_tokens
        assert torch.equal(totals.tokens_per_expert_LE, expected.tokens_per_expert_LE)
        for sum_name in ("ce_sum", "balance_sum", "z_sum"):
            assert getattr(totals, sum_name) == pytest.approx(getattr(expected, sum_name), rel=1e-12)
        for (name, one), other in zip(cut.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_load_measured_in_the_micro_batch_does_depend_on_the_cut() -> None:
    """Why global_batch exists, and why a comparison of layouts must not use micro_batch."""
    model = replace(GROK2, moe=replace(GROK2.moe, balance_loss="micro_batch"))
    tokens = make_tokens(model, batch=4)
    whole = accumulate(make_grok(model), [tokens], [tokens], None)
    halves = accumulate(make_grok(model), torch.split(tokens, 2), torch.split(tokens, 2), None)
    assert halves.balance_sum != pytest.approx(whole.balance_sum, rel=1e-4)


def test_the_gradient_of_a_step_is_that_of_its_mean_loss() -> None:
    tokens, labels = make_tokens(GROK2), make_tokens(GROK2, seed=5)
    labels[0, 0] = IGNORED_LABEL
    accumulated, plain = make_grok(GROK2), make_grok(GROK2)
    accumulate(accumulated, [tokens], [labels], None)
    output = plain(tokens)
    negative_log = -output.logits_BSV.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    router_loss = 1e-2 * output.balance_sum + 1e-3 * output.z_sum
    loss = ((negative_log * (labels != IGNORED_LABEL)).sum() + router_loss) / 17
    torch.autograd.backward(loss)
    for one, other in zip(accumulated.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-13)


def test_ignored_labels_do_not_count() -> None:
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([[1, -100, 2], [-100, -100, 6]])
    expected = -sum(logits[b, s].log_softmax(-1)[labels[b, s]] for b, s in ((0, 0), (0, 2), (1, 2)))
    torch.testing.assert_close(cross_entropy_sum(logits, labels), expected)


def test_a_fresh_model_knows_nothing() -> None:
    model = replace(GROK2, init_std=0.006, embedding_multiplier=1.0)
    tokens = make_tokens(model, 4, 32)
    loss = cross_entropy_sum(make_reference(model, 1)(tokens).logits_BSV, tokens.roll(1)).item() / tokens.numel()
    assert loss == pytest.approx(math.log(model.vocab_size), abs=1e-2)


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_follow_the_wide_one_and_keep_logits_and_losses_in_fp32(
    model: ModelConfig, dtype: torch.dtype
) -> None:
    tokens = make_tokens(model)
    narrow = make_grok(model, dtype)
    wide = Grok(model).double()
    wide.load_state_dict(narrow.state_dict())
    output, expected = narrow(tokens), wide(tokens)
    assert output.logits_BSV.dtype == output.z_sum.dtype == output.balance_sum.dtype == torch.float32
    # A narrow router may choose another expert where two are nearly tied; so compare the typical logit, not the worst.
    typical = (output.logits_BSV - expected.logits_BSV).abs().median().item()
    assert typical < 16 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        assert torch.equal(output.tokens_per_expert_LE, expected.tokens_per_expert_LE)


@pytest.mark.parametrize(("liked", "next_best"), [(0, 1), (1, 0)])
def test_the_router_of_a_bf16_model_works_in_fp32(liked: int, next_best: int) -> None:
    """Two experts whose logits differ by less than bf16 can tell are still told apart, whichever comes first."""
    moe = make_moe(replace(GROK2.moe, router_softcap=None, top_k=1), torch.bfloat16)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[next_best] = 1.0  # logit 20
        moe.gate.weight[liked, :3] = torch.tensor([19.0, 1.0, 0.0625])  # logit 20.0625; bf16 has 20 and 20.125
    _, routing = moe(torch.ones(1, 20, dtype=torch.bfloat16), None)
    assert routing.tokens_per_expert_E[liked] == 1


def test_the_attention_scores_of_a_bf16_model_are_fp32() -> None:
    """Scores 280.5 and 282.625 share out a token as fp32 tells them apart; bf16 would round them to 280 and 282."""
    model = replace(SHAPE_286B, hidden=4, num_heads=1, num_kv_heads=1, attention_softcap=None, rope_theta=1e12)
    attention = Attention(model).to(torch.bfloat16)
    x = torch.tensor([[[17.0, 33.0, 0.0, 0.0], [17.0, 33.25, 1.0, 0.0]]], dtype=torch.bfloat16)
    with torch.no_grad():
        for matrix in attention.parameters():
            matrix.zero_()
        # Element 1 of a head hardly turns at this theta, so the score is q * k / 2 in it.
        attention.q_proj.weight[1, 0] = attention.k_proj.weight[1, 1] = attention.v_proj.weight[0, 2] = 1.0
        attention.o_proj.weight[0, 0] = 1.0
        share = attention(x)[0, 1, 0].item()
    assert share == pytest.approx(1 / (1 + math.exp(280.5 - 282.625)), abs=2**-8)


def test_the_norm_of_a_bf16_model_rounds_once() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    exact = RMSNorm(256, 1e-5).double()(x.double())
    # Half a unit of bf16 in the last place (8 bits), and a little for the fp32 inside.
    assert ((RMSNorm(256, 1e-5).to(torch.bfloat16)(x).double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_a_load_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"load_LE has shape \[5, 2\]; the model has \[layers, experts\] = \[2, 5\]"):
        make_grok(GROK2)(make_tokens(GROK2), load_LE=torch.zeros(5, 2))


def test_a_step_without_labels_is_refused() -> None:
    tokens = make_tokens(GROK2)
    with pytest.raises(DataError, match="a step of 1 micro-batches has no label that counts"):
        accumulate(make_grok(GROK2), [tokens], [torch.full_like(tokens, IGNORED_LABEL)], None)
