"""Grok in plain torch, one process: THE definition. Everything fast is checked against it, forward and gradient.

It is not fast and knows no ranks. Module names spell the global parameter names, so `state_dict()` is a checkpoint.
Numbers: weights and the residual stream have the model's dtype; norms, rotary angles, attention scores, router and
logits are computed in fp32 (in the model's dtype where that is wider, so that fp64 is fp64 throughout).

Losses are sums over tokens (`megagrok.model.loss`); whoever makes a step of them divides once, as `accumulate` does.

Sources: xai-org/grok-1 model.py; sgl-project/sglang models/grok.py (Grok-2: residual MLP, soft-caps, temperature).
"""
# B batch, S sequence, T = B*S tokens, D hidden, H query heads, G kv heads, C head width, E experts, K top-k, F expert
# width, V vocabulary, L layers. In scores the first S is the query position, the second the key position.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrok.config.schema import ModelConfig, MoEConfig
from megagrok.errors import DataError, ShapeError
from megagrok.model.dropout import dropped, scale_of, stream_of, token_numbers
from megagrok.model.init import initial_value
from megagrok.model.loss import IGNORED_LABEL, balance_loss_sum, cross_entropy_sum, z_loss_sum
from megagrok.model.names import parameter_shapes


@dataclass(frozen=True, slots=True)
class Routing:
    """What one layer's router did with the tokens of a call."""

    tokens_per_expert_E: Tensor
    balance_sum: Tensor
    z_sum: Tensor


@dataclass(frozen=True, slots=True)
class Drops:
    """What dropout drops of one forward pass: a function of these two and the model's rate (megagrok.model.dropout)."""

    seed: int
    sample_ids_B: Tensor
    """Int64; numbers of the samples, counted over the whole run."""


@dataclass(frozen=True, slots=True)
class Output:
    """Result of one forward pass. The logits at position s are about token s + 1."""

    logits_BSV: Tensor
    tokens_per_expert_LE: Tensor
    """How many of a layer's K*T choices went to each expert, int64."""
    balance_sum: Tensor
    z_sum: Tensor


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all micro-batches of a step; divide the first three by num_tokens."""

    ce_sum: float
    balance_sum: float
    z_sum: float
    num_tokens: int
    """Labels that count."""
    tokens_per_expert_LE: Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is if wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Squash x smoothly into (-cap, cap); without a cap leave it."""
    return x if cap is None else cap * torch.tanh(x / cap)


def rotate(x_BSHC: Tensor, theta: float) -> Tensor:
    """Rotary position embedding, half-split: element i turns with element i + C/2 by position * theta^(-2i/C)."""
    _, num_positions, _, width = x_BSHC.shape
    position_S = torch.arange(num_positions, dtype=torch.float64, device=x_BSHC.device)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=x_BSHC.device) / width
    angle_S1c = torch.outer(position_S, theta**-exponent)[:, None, :]
    x = widen(x_BSHC)
    cos, sin = angle_S1c.cos().to(x.dtype), angle_S1c.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHC.dtype)


def temperature(num_positions: int, start: int | None) -> Tensor:
    """Factor on the scores of each query position i: 1 up to position `start`, then log2(i) / log2(start); fp64."""
    if start is None:
        return torch.ones(num_positions, dtype=torch.float64)
    return torch.arange(num_positions, dtype=torch.float64).clamp(min=start).log2() / math.log2(start)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x_D: Tensor) -> Tensor:
        x = widen(x_D)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x_D.dtype)


class Linear(nn.Linear):
    """x W^T; nothing in Grok has a bias."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)


class Attention(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model
        self.q_proj = Linear(model.hidden, model.num_heads * model.head_dim)
        self.k_proj = Linear(model.hidden, model.num_kv_heads * model.head_dim)
        self.v_proj = Linear(model.hidden, model.num_kv_heads * model.head_dim)
        self.o_proj = Linear(model.num_heads * model.head_dim, model.hidden)

    def forward(self, x_BSD: Tensor) -> Tensor:
        config, S = self.config, x_BSD.shape[1]
        q_BSHC = rotate(self.q_proj(x_BSD).unflatten(-1, (config.num_heads, config.head_dim)), config.rope_theta)
        k_BSGC = rotate(self.k_proj(x_BSD).unflatten(-1, (config.num_kv_heads, config.head_dim)), config.rope_theta)
        v_BSGC = self.v_proj(x_BSD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        # Query head h reads kv head floor(h / (H/G)).
        heads_per_kv = config.num_heads // config.num_kv_heads
        k_BSHC, v_BSHC = k_BSGC.repeat_interleave(heads_per_kv, dim=2), v_BSGC.repeat_interleave(heads_per_kv, dim=2)

        scores_BHSS = torch.einsum("bqhc,bkhc->bhqk", widen(q_BSHC), widen(k_BSHC)) * config.head_dim**-0.5
        scores_BHSS = softcap(scores_BHSS, config.attention_softcap)
        scores_BHSS = scores_BHSS * temperature(S, config.attention_temperature_positions).to(scores_BHSS)[:, None]
        is_later_SS = torch.ones(S, S, dtype=torch.bool, device=x_BSD.device).triu(diagonal=1)
        weights_BHSS = scores_BHSS.masked_fill(is_later_SS, -math.inf).softmax(dim=-1).to(v_BSHC.dtype)
        mixed_BSHC = torch.einsum("bhqk,bkhc->bqhc", weights_BHSS, v_BSHC)
        out_BSD: Tensor = self.o_proj(mixed_BSHC.flatten(-2))
        return out_BSD


class Expert(nn.Module):
    """One expert: w2( gelu(w1 x) * w3 x ), gelu in its tanh form."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden, ffn_hidden)
        self.w3 = Linear(hidden, ffn_hidden)
        self.w2 = Linear(ffn_hidden, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.w2(F.gelu(self.w1(x_TD), approximate="tanh") * self.w3(x_TD))
        return y_TD


class ResidualMLP(nn.Module):
    """The dense MLP beside the experts: the same maths under its published names."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn_hidden)
        self.up_proj = Linear(hidden, ffn_hidden)
        self.down_proj = Linear(ffn_hidden, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(F.gelu(self.gate_proj(x_TD), approximate="tanh") * self.up_proj(x_TD))
        return y_TD


class SparseMoE(nn.Module):
    """Each token visits the K experts that its router likes best; their outputs are summed, weighted by its liking."""

    def __init__(self, hidden: int, moe: MoEConfig) -> None:
        super().__init__()
        self.config = moe
        self.gate = Linear(hidden, moe.num_experts)
        self.experts = nn.ModuleList(Expert(hidden, moe.ffn_hidden) for _ in range(moe.num_experts))

    def forward(self, x_TD: Tensor, load_E: Tensor | None) -> tuple[Tensor, Routing]:
        logits_TE = softcap(F.linear(widen(x_TD), widen(self.gate.weight)), self.config.router_softcap)
        probabilities_TE = logits_TE.softmax(dim=-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.config.top_k, dim=-1)
        if self.config.renormalize_top_k:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)

        y_TD = torch.zeros_like(widen(x_TD))
        for number, expert in enumerate(self.experts):
            token_t, choice_t = (experts_TK == number).nonzero(as_tuple=True)
            y_tD = expert(x_TD.index_select(0, token_t)) * weights_TK[token_t, choice_t, None]
            y_TD = y_TD.index_add(0, token_t, y_tD)
        tokens_per_expert_E = experts_TK.flatten().bincount(minlength=self.config.num_experts)
        balance_sum = balance_loss_sum(
            self.config.balance_loss, probabilities_TE.sum(dim=0), tokens_per_expert_E, load_E
        )
        return y_TD.to(x_TD.dtype), Routing(tokens_per_expert_E, balance_sum, z_loss_sum(logits_TE))


class Residual(nn.Module):
    """h + y of one branch of one layer, without the values of y that training drops."""

    def __init__(self, model: ModelConfig, layer: int, branch: int) -> None:
        super().__init__()
        self.rate, self.max_positions = model.dropout, model.max_positions
        self.layer, self.branch = layer, branch

    def forward(self, h_BSD: Tensor, y_BSD: Tensor, drops: Drops | None) -> Tensor:
        if drops is None or not self.rate:
            return h_BSD + y_BSD
        _, S, D = h_BSD.shape
        numbers_BS = token_numbers(drops.sample_ids_B, torch.arange(S, device=h_BSD.device), self.max_positions)
        is_dropped_BSD = dropped(numbers_BS, stream_of(drops.seed, self.layer, self.branch), D, self.rate)
        return h_BSD + torch.where(is_dropped_BSD, 0, y_BSD * scale_of(self.rate))


class Layer(nn.Module):
    def __init__(self, model: ModelConfig, number: int) -> None:
        super().__init__()
        self.add_attention, self.add_moe = Residual(model, number, 0), Residual(model, number, 1)
        hidden, residual_ffn_hidden = model.hidden, model.moe.residual_ffn_hidden
        self.pre_attn_norm = RMSNorm(hidden, model.norm_eps)
        self.self_attn = Attention(model)
        self.post_attn_norm = RMSNorm(hidden, model.norm_eps)
        self.pre_moe_norm = RMSNorm(hidden, model.norm_eps)
        self.block_sparse_moe = SparseMoE(hidden, model.moe)
        self.mlp = None if residual_ffn_hidden is None else ResidualMLP(hidden, residual_ffn_hidden)
        self.post_moe_norm = RMSNorm(hidden, model.norm_eps)

    def forward(self, h_BSD: Tensor, load_E: Tensor | None, drops: Drops | None) -> tuple[Tensor, Routing]:
        h_BSD = self.add_attention(h_BSD, self.post_attn_norm(self.self_attn(self.pre_attn_norm(h_BSD))), drops)
        x_TD = self.pre_moe_norm(h_BSD).flatten(0, 1)
        y_TD, routing = self.block_sparse_moe(x_TD, load_E)
        if self.mlp is not None:
            y_TD = (self.mlp(x_TD) + y_TD) / math.sqrt(2)
        return self.add_moe(h_BSD, self.post_moe_norm(y_TD).view_as(h_BSD), drops), routing


class Decoder(nn.Module):
    """Embedding, layers and final norm; the modules below `model.` in the published names."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding_multiplier = model.embedding_multiplier
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden)
        self.layers = nn.ModuleList(Layer(model, number) for number in range(model.num_layers))
        self.norm = RMSNorm(model.hidden, model.norm_eps)

    def forward(self, tokens_BS: Tensor, load_LE: Tensor | None, drops: Drops | None) -> tuple[Tensor, list[Routing]]:
        h_BSD = self.embed_tokens(tokens_BS) * self.embedding_multiplier
        routings = []
        for number, layer in enumerate(self.layers):
            h_BSD, routing = layer(h_BSD, None if load_LE is None else load_LE[number], drops)
            routings.append(routing)
        return self.norm(h_BSD), routings


class Grok(nn.Module):
    """The whole model. Its parameters are torch's default noise until loaded; `make_reference` builds one to train."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model
        self.model = Decoder(model)
        self.lm_head = None if model.tied_embeddings else Linear(model.hidden, model.vocab_size)

    def forward(self, tokens_BS: Tensor, *, load_LE: Tensor | None = None, drops: Drops | None = None) -> Output:
        """tokens_BS: int64 in [0, V). load_LE: `expert_load` of the previous step, read only by balance_loss
        "global_batch", where None, at the first step, is uniform. drops: given in training only; None drops nothing.
        Raises ShapeError if load_LE is not [L, E]."""
        config = self.config
        if load_LE is not None and load_LE.shape != (config.num_layers, config.moe.num_experts):
            expected = [config.num_layers, config.moe.num_experts]
            raise ShapeError(f"load_LE has shape {list(load_LE.shape)}; the model has [layers, experts] = {expected}.")
        x_BSD, routings = self.model(tokens_BS, load_LE, drops)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits_BSV = widen(F.linear(x_BSD, head.weight)) * config.output_multiplier
        return Output(
            logits_BSV=softcap(logits_BSV, config.final_softcap),
            tokens_per_expert_LE=torch.stack([routing.tokens_per_expert_E for routing in routings]),
            balance_sum=torch.stack([routing.balance_sum for routing in routings]).sum(),
            z_sum=torch.stack([routing.z_sum for routing in routings]).sum(),
        )


def make_reference(model: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Grok:
    """Grok with the documented first values of `seed` (`megagrok.model.init`), on CPU."""
    with torch.device("meta"):
        grok = Grok(model)
    values = {name: initial_value(name, model, seed, dtype=dtype) for name in parameter_shapes(model)}
    grok.load_state_dict(values, strict=True, assign=True)
    return grok


def training_loss_sum(output: Output, labels_BS: Tensor, model: ModelConfig) -> Tensor:
    """What a micro-batch adds to the step's loss, before the step's one division by its number of labels."""
    router_sum = model.moe.balance_coefficient * output.balance_sum + model.moe.z_loss_coefficient * output.z_sum
    return cross_entropy_sum(output.logits_BSV, labels_BS) + router_sum


def accumulate(
    grok: Grok,
    tokens: Sequence[Tensor],
    labels: Sequence[Tensor],
    load_LE: Tensor | None,
    *,
    seed: int = 0,
    sample_ids: Sequence[int] = (),
) -> Totals:
    """Forward and backward over a step's micro-batches: adds the gradient of the step's loss to every `.grad`.

    tokens, labels: one [B, S] tensor per micro-batch. seed, sample_ids: of the run, and of all samples in order; only
    a model with dropout needs them. Raises DataError if no label of the step counts, or sample ids are missing.
    """
    num_tokens = sum(int((labels_BS != IGNORED_LABEL).sum()) for labels_BS in labels)
    if num_tokens == 0:
        raise DataError(f"a step of {len(labels)} micro-batches has no label that counts; its mean loss has no value.")
    sizes = [len(tokens_BS) for tokens_BS in tokens]
    drops: list[Drops | None] = [None] * len(sizes)
    if grok.config.dropout:
        if len(sample_ids) != sum(sizes):
            raise DataError(f"{len(sample_ids)} sample ids for {sum(sizes)} samples: dropout needs one for each.")
        drops = [Drops(seed, ids_B) for ids_B in torch.tensor(sample_ids).split(sizes)]
    ce_sum = balance_sum = z_sum = 0.0
    tokens_per_expert_LE = torch.zeros(grok.config.num_layers, grok.config.moe.num_experts, dtype=torch.int64)
    for tokens_BS, labels_BS, drop in zip(tokens, labels, drops, strict=True):
        output = grok(tokens_BS, load_LE=load_LE, drops=drop)
        torch.autograd.backward(training_loss_sum(output, labels_BS, grok.config) / num_tokens)
        ce_sum += cross_entropy_sum(output.logits_BSV, labels_BS).item()
        balance_sum += output.balance_sum.item()
        z_sum += output.z_sum.item()
        tokens_per_expert_LE += output.tokens_per_expert_LE
    return Totals(ce_sum, balance_sum, z_sum, num_tokens, tokens_per_expert_LE)
