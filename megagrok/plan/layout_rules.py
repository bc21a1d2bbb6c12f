"""Which layouts a model fits: heads, layers, experts and positions divided over ranks.

House facts that the rules rest on. Experts are never split by tensor parallelism: they live whole on parallel.expert
consecutive ranks of the tensor * context * data ranks of a pipeline stage. Key and value heads are never copied. With
expert and tensor parallelism together, tokens have to be split over the tensor ranks (sequence), or each would be
dispatched once for every tensor rank.
"""

import math
from collections.abc import Iterator

from megagrok.config.near import divisors, multiples
from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig
from megagrok.plan.batch import stage_ranks, world_size
from megagrok.plan.rules import Rule, fixes, not_a_multiple

FP8_MULTIPLE = 16


def _layers_over_stages(config: RunConfig) -> Iterator[Problem]:
    layers, pipeline = config.model.num_layers, config.parallel.pipeline
    advice = fixes("parallel.pipeline", divisors(layers, pipeline))
    more = fixes("model.num_layers", multiples(pipeline, layers))
    yield from not_a_multiple("model.num_layers", layers, "parallel.pipeline", pipeline, "", advice, more)


def _stage_over_chunks(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.virtual_pipeline == 1 or config.model.num_layers % parallel.pipeline:
        return
    key = "parallel.virtual_pipeline"
    if parallel.pipeline == 1:
        text = f"{key} = {parallel.virtual_pipeline}, needs parallel.pipeline > 1: chunks interleave between stages."
        yield Problem(key, text, (Fix(key, 1),))
        return
    layers = config.model.num_layers // parallel.pipeline
    if layers % parallel.virtual_pipeline:
        text = (
            f"model.num_layers / parallel.pipeline = {layers}, needs a multiple of {key} ({parallel.virtual_pipeline})."
        )
        yield Problem(key, text, tuple(fixes(key, divisors(layers, parallel.virtual_pipeline))))


def _heads_over_tensor(config: RunConfig) -> Iterator[Problem]:
    tensor, heads, kv_heads = config.parallel.tensor, config.model.num_heads, config.model.num_kv_heads
    advice = fixes("parallel.tensor", divisors(kv_heads, tensor))
    # Query heads are a multiple of key and value heads, so the first implies the second.
    if heads % tensor:
        more = fixes("model.num_heads", multiples(tensor, heads))
        yield from not_a_multiple("model.num_heads", heads, "parallel.tensor", tensor, "", advice, more)
    else:
        why, more = "key and value heads are not copied", fixes("model.num_kv_heads", multiples(tensor, kv_heads))
        yield from not_a_multiple("model.num_kv_heads", kv_heads, "parallel.tensor", tensor, why, advice, more)


def _vocab_over_tensor(config: RunConfig) -> Iterator[Problem]:
    tensor, vocab_size = config.parallel.tensor, config.model.vocab_size
    advice = fixes("model.vocab_size", multiples(tensor, vocab_size)[::-1])
    why = "the embedding is split by rows"
    yield from not_a_multiple("model.vocab_size", vocab_size, "parallel.tensor", tensor, why, advice)


def _residual_ffn_over_tensor(config: RunConfig) -> Iterator[Problem]:
    tensor, width = config.parallel.tensor, config.model.moe.residual_ffn_hidden
    if width is not None:
        key = "model.moe.residual_ffn_hidden"
        advice = fixes(key, multiples(tensor, width))
        yield from not_a_multiple(key, width, "parallel.tensor", tensor, "", advice)


def _sequence_parallel(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        text = "parallel.sequence = true, needs parallel.tensor > 1: it splits over the tensor ranks."
        yield Problem("parallel.sequence", text, (Fix("parallel.sequence", False),))
    if parallel.expert > 1 and parallel.tensor > 1 and not parallel.sequence:
        sizes = f"parallel.expert = {parallel.expert} and parallel.tensor = {parallel.tensor}"
        text = f"parallel.sequence = false with {sizes}, needs true: else each tensor rank dispatches the same tokens."
        yield Problem("parallel.sequence", text, (Fix("parallel.sequence", True), Fix("parallel.expert", 1)))


def _sequence_over_ranks(config: RunConfig) -> Iterator[Problem]:
    parallel, seq_len, key = config.parallel, config.train.seq_len, "train.seq_len"
    pieces = 2 * parallel.context if parallel.context > 1 else 1
    shares = parallel.tensor * parallel.context if parallel.sequence else 1
    advice = fixes(key, multiples(math.lcm(pieces, shares), seq_len))
    if seq_len % pieces:
        why = "each context rank takes one early and one late piece, so that the causal work is even"
        yield from not_a_multiple(key, seq_len, "2 * parallel.context", pieces, why, advice)
    else:
        yield from not_a_multiple(key, seq_len, "parallel.tensor * parallel.context", shares, "", advice)


def _experts_over_ranks(config: RunConfig) -> Iterator[Problem]:
    expert, num_experts, ranks = config.parallel.expert, config.model.moe.num_experts, stage_ranks(config.parallel)
    advice = fixes("parallel.expert", divisors(num_experts, expert))
    more = fixes("model.moe.num_experts", multiples(expert, num_experts))
    yield from not_a_multiple("model.moe.num_experts", num_experts, "parallel.expert", expert, "", advice, more)
    if ranks % expert:
        text = (
            f"parallel.expert = {expert}, needs a divisor of parallel.tensor * context * data = {ranks}: "
            "experts are shared out over the ranks of one pipeline stage."
        )
        candidates = fixes("parallel.expert", divisors(ranks, expert))
        candidates += fixes("parallel.data", multiples(expert, config.parallel.data))
        yield Problem("parallel.expert", text, tuple(candidates))


def _optimizer_state(config: RunConfig) -> Iterator[Problem]:
    parallel, precision = config.parallel, config.train.precision
    if parallel.zero == 2 and parallel.pipeline > 1:
        text = (
            f"parallel.zero = 2 with parallel.pipeline = {parallel.pipeline}, needs 0 or 1: a pipeline keeps gradients "
            "over all micro-batches, so sharding them saves nothing."
        )
        yield Problem("parallel.zero", text, (Fix("parallel.zero", 1),))
    if parallel.zero != 1 and precision != "fp32":
        text = (
            f"parallel.zero = {parallel.zero} with train.precision = {precision}, needs 1: "
            "DeepSpeed accumulates gradients in fp32 at that stage only."
        )
        yield Problem("parallel.zero", text, (Fix("parallel.zero", 1), Fix("train.precision", "fp32")))


def _fp8_widths(config: RunConfig) -> Iterator[Problem]:
    if config.train.precision != "fp8":
        return
    model, tensor = config.model, config.parallel.tensor
    widths = [
        ("model.hidden", model.hidden, 1, FP8_MULTIPLE),
        ("model.num_heads", model.num_heads, model.head_dim, FP8_MULTIPLE * tensor),
        ("model.num_kv_heads", model.num_kv_heads, model.head_dim, FP8_MULTIPLE * tensor),
        ("model.moe.ffn_hidden", model.moe.ffn_hidden, 1, FP8_MULTIPLE),
    ]
    if model.moe.residual_ffn_hidden is not None:
        widths.append(("model.moe.residual_ffn_hidden", model.moe.residual_ffn_hidden, 1, FP8_MULTIPLE * tensor))
    for key, value, factor, step in widths:
        if value * factor % step:
            name = key if factor == 1 else f"{key} * model.head_dim"
            rule = f"{FP8_MULTIPLE}" if step == FP8_MULTIPLE else f"{FP8_MULTIPLE} * parallel.tensor ({step})"
            text = f"{name} = {value * factor}, needs a multiple of {rule} for train.precision = fp8."
            candidates = fixes(key, multiples(step, value)) if factor == 1 else []
            yield Problem(key, text, (*candidates, Fix("train.precision", "bf16")))


def world_problems(config: RunConfig, ranks: int) -> Iterator[Problem]:
    """The started `ranks` are not the ones that the layout asks for."""
    parallel = config.parallel
    asked = world_size(parallel)
    if ranks == asked:
        return
    replica = parallel.tensor * parallel.context * parallel.pipeline
    counts = " or ".join(str(count) for count in multiples(replica, ranks))
    if ranks % replica == 0 and ranks > 0:
        text = (
            f"world = {ranks} ranks, parallel.tensor * context * pipeline * data = {asked}: start {asked}, or "
            "change the number of replicas."
        )
        yield Problem("parallel.data", text, (Fix("parallel.data", ranks // replica),))
    else:
        text = (
            f"world = {ranks} ranks, needs a multiple of parallel.tensor * context * pipeline = {replica}: "
            f"start {asked}, as the layout asks, or {counts} with parallel.data to match"
        )
        yield Problem("parallel.data", text)


_WIDTHS = ("model.hidden", "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.moe.ffn_hidden")
_STAGE = ("parallel.tensor", "parallel.context", "parallel.data")

LAYOUT_RULES = (
    Rule(("model.num_layers", "parallel.pipeline"), _layers_over_stages),
    Rule(("model.num_layers", "parallel.pipeline", "parallel.virtual_pipeline"), _stage_over_chunks),
    Rule(("model.num_heads", "model.num_kv_heads", "parallel.tensor"), _heads_over_tensor),
    Rule(("model.vocab_size", "parallel.tensor"), _vocab_over_tensor),
    Rule(("model.moe.residual_ffn_hidden", "parallel.tensor"), _residual_ffn_over_tensor),
    Rule(("parallel.tensor", "parallel.expert", "parallel.sequence"), _sequence_parallel),
    Rule(("train.seq_len", "parallel.tensor", "parallel.context", "parallel.sequence"), _sequence_over_ranks),
    Rule(("model.moe.num_experts", "parallel.expert", *_STAGE), _experts_over_ranks),
    Rule(("parallel.pipeline", "parallel.zero", "train.precision"), _optimizer_state),
    Rule((*_WIDTHS, "model.moe.residual_ffn_hidden", "parallel.tensor", "train.precision"), _fp8_widths),
)
