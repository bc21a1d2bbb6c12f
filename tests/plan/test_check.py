"""What cannot work is refused before a process group exists, and every piece of advice helps."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from large_layout import TENSOR_8

from megagrok.config import Loaded, RunConfig, decode_config, load_config
from megagrok.config.fields import all_settings, without_null
from megagrok.errors import ConfigError
from megagrok.plan import check, describe_run, require_runnable, with_setting, world_size
from megagrok.plan.check import RULES

RUNS = Path(__file__).parents[2] / "configs" / "run"
# The quickstart's layout with numbers of our own: tuning the quickstart must move no law.
NUMBERS = (
    "train.steps=300",
    "train.micro_batch=2",
    "train.global_batch=8",
    "train.evaluate_samples=16",
    "optimizer.lr=3.0e-3",
    "schedule.warmup_steps=30",
    "schedule.decay_steps=60",
)
QUICK = load_config(RUNS / "quickstart.yaml", NUMBERS).config
PRETRAIN = load_config(RUNS / "pretrain-286b.yaml", TENSOR_8).config


def changed(config: RunConfig, written: Mapping[str, object]) -> RunConfig:
    for key, value in written.items():
        assert isinstance(value, str | int | float | bool | None)
        config = with_setting(config, key, value)
    return config


REFUSALS: list[tuple[RunConfig, dict[str, object], str]] = [
    # 1-3 layers over stages and chunks
    (
        PRETRAIN,
        {"model.num_layers": 61},
        "model.num_layers = 61, needs a multiple of parallel.pipeline (8). Fix: model.num_layers = 64.",
    ),
    (
        PRETRAIN,
        {"parallel.virtual_pipeline": 3},
        "model.num_layers / parallel.pipeline = 8, needs a multiple of parallel.virtual_pipeline (3). "
        "Fix: parallel.virtual_pipeline in {4, 2, 1}.",
    ),
    (
        QUICK,
        {"parallel.pipeline": 1, "parallel.virtual_pipeline": 2},
        "parallel.virtual_pipeline = 2, needs parallel.pipeline > 1: chunks interleave between stages. "
        "Fix: parallel.virtual_pipeline = 1.",
    ),
    # 4, 5 heads over tensor ranks
    (
        QUICK,
        {"model.num_heads": 5, "model.num_kv_heads": 5},
        "model.num_heads = 5, needs a multiple of parallel.tensor (2).",
    ),
    (
        QUICK,
        {"model.num_kv_heads": 1},
        "model.num_kv_heads = 1, needs a multiple of parallel.tensor (2): key and value heads are not copied. "
        "Fix: model.num_kv_heads = 2.",
    ),
    # 6, 9 within the model
    (
        QUICK,
        {"model.num_kv_heads": 4},
        "model.num_heads = 6, needs a multiple of model.num_kv_heads (4). Fix: model.num_kv_heads in {6, 2}.",
    ),
    (
        QUICK,
        {"model.moe.top_k": 9},
        "model.moe.top_k = 9, needs <= model.moe.num_experts (8). Fix: model.moe.top_k = 8.",
    ),
    # 8, 12 experts over ranks
    (
        PRETRAIN,
        {"model.moe.num_experts": 60},
        "model.moe.num_experts = 60, needs a multiple of parallel.expert (8). "
        "Fix: parallel.expert in {4, 2, 1} or model.moe.num_experts in {56, 64}.",
    ),
    (
        QUICK,
        {"parallel.expert": 4},
        "parallel.expert = 4, needs a divisor of parallel.tensor * context * data = 2: experts are shared "
        "out over the ranks "
        "of one pipeline stage. Fix: parallel.expert in {2, 1}.",
    ),
    # 14-16 batches
    (
        PRETRAIN,
        {"train.global_batch": 8190},
        "train.global_batch = 8190, needs a multiple of train.micro_batch * parallel.data (8). "
        "Fix: train.global_batch in {8192, 8128}.",
    ),
    (
        PRETRAIN,
        {"train.batch_ramp.1.global_batch": 4100},
        "train.batch_ramp.1.global_batch = 4100, needs a multiple of train.micro_batch * parallel.data (8). "
        "Fix: train.batch_ramp.1.global_batch in {4096, 4160}.",
    ),
    (
        QUICK,
        {"train.global_batch": 2},
        "train.global_batch / (train.micro_batch * parallel.data) = 1 micro-batches, needs >= parallel.pipeline (2). "
        "Fix: train.global_batch in {4, 8} or train.micro_batch = 1.",
    ),
    (
        QUICK,
        {"parallel.virtual_pipeline": 2, "train.global_batch": 6},
        "train.global_batch / (train.micro_batch * parallel.data) = 3 micro-batches, needs a multiple of "
        "parallel.pipeline (2)",
    ),
    (
        QUICK,
        {"train.evaluate_samples": 15},
        "train.evaluate_samples = 15, needs a multiple of train.micro_batch * parallel.data (2). "
        "Fix: train.evaluate_samples in {14, 16}.",
    ),
    (
        QUICK,
        {"parallel.virtual_pipeline": 2, "train.evaluate_samples": 6},
        "train.evaluate_samples / (train.micro_batch * parallel.data) = 3 micro-batches, needs a multiple of "
        "parallel.pipeline (2): interleaved chunks take turns in rounds of that many. "
        "Fix: train.evaluate_samples in {4, 8} or parallel.virtual_pipeline = 1.",
    ),
    # 17, 18 sequences
    (
        QUICK,
        {"parallel.context": 2, "train.seq_len": 254},
        "train.seq_len = 254, needs a multiple of 2 * parallel.context (4): each context rank takes one "
        "early and one late "
        "piece, so that the causal work is even. Fix: train.seq_len in {252, 256}.",
    ),
    (
        QUICK,
        {"train.seq_len": 255},
        "train.seq_len = 255, needs a multiple of parallel.tensor * parallel.context (2). "
        "Fix: train.seq_len in {254, 256}.",
    ),
    (
        QUICK,
        {"train.seq_len": 512},
        "train.seq_len = 512, needs <= model.max_positions (256). "
        "Fix: train.seq_len = 256 or model.max_positions = 512.",
    ),
    # 19 sequence parallelism
    (
        QUICK,
        {"parallel.tensor": 1, "parallel.expert": 1},
        "parallel.sequence = true, needs parallel.tensor > 1: it splits over the tensor ranks. "
        "Fix: parallel.sequence = false.",
    ),
    (
        QUICK,
        {"parallel.sequence": False},
        "parallel.sequence = false with parallel.expert = 2 and parallel.tensor = 2, needs true: else each tensor rank "
        "dispatches the same tokens. Fix: parallel.sequence = true or parallel.expert = 1.",
    ),
    # 21 fp8 widths
    (
        PRETRAIN,
        {"train.precision": "fp8", "model.moe.ffn_hidden": 21848},
        "model.moe.ffn_hidden = 21848, needs a multiple of 16 for train.precision = fp8. "
        "Fix: model.moe.ffn_hidden in {21840, 21856} or train.precision = bf16.",
    ),
    (
        PRETRAIN,
        {"train.precision": "fp8", "model.head_dim": 8},
        "model.num_kv_heads * model.head_dim = 64, needs a multiple of 16 * parallel.tensor (128) for "
        "train.precision = fp8. "
        "Fix: train.precision = bf16.",
    ),
    # 26 rates and phases
    (
        QUICK,
        {"schedule.min_lr": 1.0},
        "schedule.min_lr = 1.0, needs <= optimizer.lr (0.003). Fix: schedule.min_lr = 0.003 or optimizer.lr = 1.0.",
    ),
    (
        QUICK,
        {"train.steps": 80},
        "schedule.warmup_steps + schedule.decay_steps = 30 + 60, needs <= train.steps (80). "
        "Fix: schedule.decay_steps = 50 or schedule.warmup_steps = 20 or train.steps = 90.",
    ),
    (
        QUICK,
        {"schedule.kind": "cosine", "train.steps": 20},
        "schedule.warmup_steps = 30, needs <= train.steps (20). Fix: schedule.warmup_steps = 20.",
    ),
    # ours: vocabulary, residual MLP, ZeRO
    (
        QUICK,
        {"data.tokenizer_vocab_size": 5001},
        "data.tokenizer_vocab_size = 5001, needs <= model.vocab_size (4096). "
        "Fix: data.tokenizer_vocab_size = 4096 or model.vocab_size = 5002.",
    ),
    (
        QUICK,
        {"model.vocab_size": 4097},
        "model.vocab_size = 4097, needs a multiple of parallel.tensor (2): the embedding is split by rows. "
        "Fix: model.vocab_size in {4098, 4096}.",
    ),
    (
        QUICK,
        {"model.moe.residual_ffn_hidden": 9},
        "model.moe.residual_ffn_hidden = 9, needs a multiple of parallel.tensor (2). "
        "Fix: model.moe.residual_ffn_hidden in {8, 10}.",
    ),
    (
        QUICK,
        {"parallel.zero": 2},
        "parallel.zero = 2 with parallel.pipeline = 2, needs 0 or 1: a pipeline keeps gradients over all "
        "micro-batches, so "
        "sharding them saves nothing. Fix: parallel.zero = 1.",
    ),
    (
        PRETRAIN,
        {"parallel.zero": 0},
        "parallel.zero = 0 with train.precision = bf16, needs 1: DeepSpeed accumulates gradients in fp32 at that stage "
        "only. Fix: parallel.zero = 1 or train.precision = fp32.",
    ),
    (
        QUICK,
        {"parallel.zero": 2, "parallel.pipeline": 1, "train.precision": "bf16"},
        "parallel.zero = 2 with train.precision = bf16, needs 1: DeepSpeed accumulates gradients in fp32 at that stage "
        "only. Fix: parallel.zero = 1 or train.precision = fp32.",
    ),
]


@pytest.mark.parametrize(("config", "written", "text"), REFUSALS, ids=[f"{row[1]}" for row in REFUSALS])
def test_what_cannot_work_is_refused_with_what_can(config: RunConfig, written: dict[str, object], text: str) -> None:
    problems = [str(problem) for problem in check(changed(config, written))]
    assert any(problem.startswith(text) for problem in problems), "\n".join(problems)
    assert len(problems) == 1, "one mistake, one problem"


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_is_accepted_on_its_own_world(path: Path) -> None:
    config = load_config(path).config
    assert check(config) == []
    assert check(config, world_size(config.parallel)) == []


@pytest.mark.parametrize(
    ("written", "ranks", "text"),
    [
        (
            {},
            48,
            "world = 48 ranks, needs a multiple of parallel.tensor * context * pipeline = 64: start 512, as the "
            "layout asks, or 64 with",
        ),
        ({}, 100, "start 512, as the layout asks, or 64 or 128 with parallel.data to match"),
        (
            {},
            256,
            "world = 256 ranks, parallel.tensor * context * pipeline * data = 512: start 512, or change the "
            "number of replicas. Fix: parallel.data = 4.",
        ),
        ({}, 1024, "Fix: parallel.data = 16."),
    ],
)
def test_another_number_of_ranks_is_refused_with_the_nearest(written: dict[str, object], ranks: int, text: str) -> None:
    problems = [str(problem) for problem in check(changed(PRETRAIN, written), ranks)]
    assert any(text in problem for problem in problems), problems
    assert any(problem.startswith(f"world = {ranks}") for problem in problems)


def test_advice_that_leads_into_another_refusal_is_not_given() -> None:
    # Twenty ranks are five replicas, over which no batch of the quick start divides.
    (problem,) = check(QUICK, 20)
    assert problem.text.startswith("world = 20 ranks")
    assert problem.fixes == ()


def test_ranges_and_rules_are_told_together_and_a_rule_keeps_off_broken_settings() -> None:
    written = {"optimizer.lr": -1.0, "model.num_layers": 61, "parallel.tensor": 0, "train.micro_batch": 0}
    keys = {problem.key for problem in check(changed(PRETRAIN, written), 7)}
    assert keys == {"optimizer.lr", "model.num_layers", "parallel.tensor", "train.micro_batch"}


def test_a_refusal_tells_where_each_setting_was_written() -> None:
    loaded = decode_config(RUNS / "quickstart.yaml", ["parallel.expert=4", "optimizer.lr=-1.0"])
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems in quickstart:.*\(override\).*parallel\.expert = 4.*\(override\)"
    ):
        require_runnable(loaded)
    require_runnable(Loaded(QUICK, {}), 4)


def test_every_rule_names_settings_that_exist() -> None:
    assert {key for rule in RULES for key in rule.reads} <= set(all_settings())


NUMBERS = [key for key, setting in all_settings().items() if without_null(setting.annotation) in (int, float)]


@pytest.mark.parametrize("value", ["-1", "0", "9007199254740992"])
@pytest.mark.parametrize("key", [key for key in NUMBERS if key.split(".")[1] not in ("batch_ramp", "sources")])
def test_no_number_makes_the_check_fail_or_wander(key: str, value: str) -> None:
    # A rule whose `reads` forgets a setting divides by 0 here; an unbounded search would not end.
    config = decode_config(RUNS / "pretrain-286b.yaml", [f"{key}={value}"]).config
    if not check(config, 512):
        describe_run(config)


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
LAYOUTS = st.fixed_dictionaries(
    {
        "parallel.tensor": SIZES,
        "parallel.sequence": st.booleans(),
        "parallel.pipeline": SIZES,
        "parallel.virtual_pipeline": st.sampled_from([1, 1, 2, 3]),
        "parallel.context": st.sampled_from([1, 1, 2, 3]),
        "parallel.expert": SIZES,
        "parallel.data": SIZES,
        "parallel.zero": st.integers(0, 2),
        "model.num_layers": st.integers(1, 12),
        "model.num_heads": st.integers(1, 12),
        "model.num_kv_heads": SIZES,
        "model.moe.num_experts": st.integers(1, 12),
        "model.moe.top_k": st.integers(1, 4),
        "train.seq_len": st.sampled_from([8, 12, 16, 30, 96]),
        "train.global_batch": st.integers(1, 64),
        "train.micro_batch": st.integers(1, 4),
        "train.evaluate_samples": st.integers(1, 32),
        "train.precision": st.sampled_from(["fp32", "bf16", "fp8"]),
        "train.steps": st.integers(1, 200),
    }
)
RANKS = st.none() | st.integers(1, 64)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, ranks=RANKS)
def test_every_piece_of_advice_leaves_fewer_problems(layout: dict[str, object], ranks: int | None) -> None:
    config = changed(QUICK, layout)
    problems = check(config, ranks)
    for problem in problems:
        for fix in problem.fixes:
            assert len(check(with_setting(config, fix.key, fix.value), ranks)) < len(problems), str(problem)


@settings(max_examples=200, deadline=None)
@given(layout=LAYOUTS, ranks=RANKS)
def test_an_accepted_layout_divides_everything_it_spreads(layout: dict[str, object], ranks: int | None) -> None:
    config = changed(QUICK, layout)
    model, parallel, train = config.model, config.parallel, config.train
    divides = [
        (model.num_layers, parallel.pipeline * parallel.virtual_pipeline),
        (model.num_heads, parallel.tensor),
        (model.num_kv_heads, parallel.tensor),
        (model.num_heads, model.num_kv_heads),
        (model.moe.num_experts, parallel.expert),
        (parallel.tensor * parallel.context * parallel.data, parallel.expert),
        (train.global_batch, train.micro_batch * parallel.data),
        (train.evaluate_samples, train.micro_batch * parallel.data),
        (train.seq_len, parallel.context * (parallel.tensor if parallel.sequence else 1)),
    ]
    works = all(whole % part == 0 for whole, part in divides)
    works &= parallel.tensor > 1 or not parallel.sequence
    works &= parallel.sequence or parallel.expert == 1 or parallel.tensor == 1
    works &= ranks in (None, world_size(parallel))
    if not works:
        assert check(config, ranks)


def test_texts_of_problems_are_one_sentence_each() -> None:
    for config, written, _ in REFUSALS:
        for problem in check(changed(config, written)):
            assert "\n" not in str(problem)
            assert not re.search(r"\.\.|: \.|  ", str(problem).replace("{", "")), str(problem)
