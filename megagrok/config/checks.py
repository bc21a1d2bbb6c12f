"""Ranges: what one field, or the fields of one section, can break on their own. All of it, not the first.

Not here: what sections break together, such as divisibility by the layout (`megagrok.plan.check`), and what needs the
machine, such as whether a path exists.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from megagrok.config.near import divisors
from megagrok.config.problems import Fix, Problem, is_secret, shown
from megagrok.config.schema import DataConfig, ModelConfig, MoEConfig, RunConfig, SourceConfig, TrainConfig

# Integers above this are not exact for readers of JSON that keep numbers as float64.
LARGEST_COUNT = 2**53

# Integers have to be at least 1, but for these.
LEAST: Mapping[str, int] = {
    "seed": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "zero": 0,
    "keep": 2,
    "window_steps": 8,
    "replica_check_every_steps": 0,
    "attention_temperature_positions": 2,
    "tokenizer_vocab_size": 257,
}
WHY_LEAST: Mapping[str, str] = {
    "window_steps": "a quarter of them has to have a spread",
    "keep": "a bad newest checkpoint would end the run",
    "tokenizer_vocab_size": "256 bytes and the end of a document",
    "attention_temperature_positions": "logits are divided by its logarithm",
}

# Numbers have to be finite, and: above 0; at least 0; from 0 up to, not including, 1; between 0 and 1.
SOFTCAPS = frozenset(("attention_softcap", "router_softcap", "final_softcap"))
MULTIPLIERS = frozenset(("embedding_multiplier", "output_multiplier"))
LIMITS = frozenset(f"{phase}_seconds" for phase in ("start", "load", "step", "evaluate", "save"))
ABOVE_ZERO = (
    SOFTCAPS | MULTIPLIERS | LIMITS | frozenset(("rope_theta", "norm_eps", "init_std", "lr", "eps", "spike_sigmas"))
)
NOT_NEGATIVE = frozenset(("balance_coefficient", "z_loss_coefficient", "weight_decay", "clip_norm", "min_lr"))
BELOW_ONE = frozenset(("beta1", "beta2", "dropout"))
BETWEEN = frozenset(("held_out_fraction",))

PATHS = frozenset(("runs_dir", "cache", "tokens", "tokenizer", "path"))
# Limits of Linux and its file systems; what megagrok appends to a folder of the configuration is within the rest.
LONGEST_NAME_BYTES, LONGEST_PATH_BYTES = 255, 3500
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def field_problems(section: object, key: str = "") -> list[Problem]:
    """Everything out of range in `section` (any dataclass of the schema, which stands at `key`) and below it."""
    return list(_problems(section, key))


def path_problem(key: str, path: str) -> str | None:
    """Why `path` cannot be meant as it stands; None if it can. Does not look at the disk."""
    if not path.strip():
        return f"{key} is empty, needs a path"
    control = next((character for character in path if ord(character) < 32 or ord(character) == 127), None)
    if control is not None:
        return f"{key} = {shown(path)}: a path has no control character such as {control!r}"
    variable = re.search(r"\$\{?(\w+)\}?", path)
    if variable is not None:
        return (
            f"{key} = {path}: {variable.group(1)} is not set, a configuration reads no environment: write the path out"
        )
    longest = max(path.split("/"), key=lambda part: len(part.encode()))
    if len(longest.encode()) > LONGEST_NAME_BYTES or len(path.encode()) > LONGEST_PATH_BYTES:
        return (
            f"{key} = {shown(path)}: {len(path.encode()):,} bytes, the longest part {len(longest.encode()):,}; "
            f"a path has at most {LONGEST_PATH_BYTES:,}, each part {LONGEST_NAME_BYTES}"
        )
    if path.startswith("~"):
        return f"{key} = {path}: ~ is not expanded: write the path out"
    return None


def _problems(section: object, key: str) -> Iterator[Problem]:
    assert dataclasses.is_dataclass(section) and not isinstance(section, type), f"{key}: no section"
    prefix = f"{key}." if key else ""
    for field in dataclasses.fields(section):
        yield from _value_problems(field.name, getattr(section, field.name), f"{prefix}{field.name}")
    match section:
        case MoEConfig():
            yield from _moe(section, prefix)
        case ModelConfig():
            yield from _model(section, prefix)
        case TrainConfig():
            yield from _batch_ramp(section, prefix)
        case DataConfig():
            yield from _data(section, prefix)
        case SourceConfig():
            yield from _source(section, prefix)
        case RunConfig():
            yield from _run(section)


def _value_problems(name: str, value: object, key: str) -> Iterator[Problem]:
    match value:
        case None | bool():
            return
        case int():
            yield from _integer(name, value, key)
        case float():
            yield from _number(name, value, key)
        case str():
            yield from _text(name, value, key)
        case tuple():
            for i, item in enumerate(value):
                yield from _problems(item, f"{key}.{i}")
        case _:
            yield from _problems(value, key)


def _integer(name: str, value: int, key: str) -> Iterator[Problem]:
    least = LEAST.get(name, 1)
    if value < least:
        why = f": {WHY_LEAST[name]}" if name in WHY_LEAST else ""
        yield Problem(key, f"{key} = {shown(value)}, needs >= {least}{why}.", (Fix(key, least),))
    elif value > LARGEST_COUNT:
        yield Problem(key, f"{key} = {shown(value)}, needs <= {LARGEST_COUNT:,}")


def _number(name: str, value: float, key: str) -> Iterator[Problem]:
    rule = ""
    if not math.isfinite(value):
        rule = "a finite number"
    elif name in ABOVE_ZERO and value <= 0:
        rule = "> 0, or null for none" if name in SOFTCAPS else "> 0"
    elif name in NOT_NEGATIVE and value < 0:
        rule = ">= 0"
    elif name in BELOW_ONE and not 0 <= value < 1:
        rule = ">= 0 and < 1"
    elif name in BETWEEN and not 0 < value < 1:
        rule = "> 0 and < 1"
    if rule:
        yield Problem(key, f"{key} = {value}, needs {rule}")


def _text(name: str, value: str, key: str) -> Iterator[Problem]:
    if is_secret(value):
        advice = "keep it in the environment (WANDB_API_KEY, HF_TOKEN): configurations go into checkpoints and logs"
        yield Problem(key, f"{key} looks like a secret: {advice}")
    elif name in PATHS:
        wrong = path_problem(key, value)
        if wrong:
            yield Problem(key, wrong)
    elif not value.strip() or not value.isprintable():
        yield Problem(key, f"{key} = {shown(value)}, needs printable text")


def _moe(moe: MoEConfig, prefix: str) -> Iterator[Problem]:
    if moe.top_k > moe.num_experts >= 1:
        key = f"{prefix}top_k"
        rule = f"needs <= {prefix}num_experts ({moe.num_experts})."
        yield Problem(key, f"{key} = {moe.top_k}, {rule}", (Fix(key, moe.num_experts),))


def _model(model: ModelConfig, prefix: str) -> Iterator[Problem]:
    heads, kv_heads = model.num_heads, model.num_kv_heads
    if heads >= 1 and kv_heads >= 1 and heads % kv_heads:
        key = f"{prefix}num_kv_heads"
        text = f"{prefix}num_heads = {heads}, needs a multiple of {key} ({kv_heads})."
        yield Problem(key, text, tuple(Fix(key, value) for value in divisors(heads, kv_heads)[:3]))
    if model.head_dim >= 1 and model.head_dim % 2:
        key = f"{prefix}head_dim"
        text = f"{key} = {model.head_dim}, needs an even number: rotary positions turn pairs."
        yield Problem(key, text, (Fix(key, model.head_dim + 1),))


def _batch_ramp(train: TrainConfig, prefix: str) -> Iterator[Problem]:
    until, batch = 0, 0
    for i, stage in enumerate(train.batch_ramp):
        key = f"{prefix}batch_ramp.{i}"
        if stage.until_samples <= until:
            text = f"{key}.until_samples = {stage.until_samples}, needs > {until}, where the stage begins"
            yield Problem(f"{key}.until_samples", text)
        if stage.global_batch <= batch:
            text = f"{key}.global_batch = {stage.global_batch}, needs > {batch}, the stage before it"
            yield Problem(f"{key}.global_batch", text)
        if stage.global_batch >= train.global_batch:
            text = f"{key}.global_batch = {stage.global_batch}, needs < {prefix}global_batch ({train.global_batch})"
            yield Problem(f"{key}.global_batch", text)
        until, batch = stage.until_samples, stage.global_batch


def _data(data: DataConfig, prefix: str) -> Iterator[Problem]:
    tokens, sources = f"{prefix}tokens", f"{prefix}sources"
    tokenizer, vocab_size = f"{prefix}tokenizer", f"{prefix}tokenizer_vocab_size"
    if data.sources and data.tokens is not None:
        yield Problem(tokens, f"{tokens} and {sources} are both given, needs exactly one.", (Fix(tokens, None),))
    if not data.sources and data.tokens is None:
        yield Problem(sources, f"{sources} is empty and {tokens} is null, needs exactly one of them")
    if data.tokenizer_vocab_size is not None and data.tokenizer is not None:
        text = f"{vocab_size} = {data.tokenizer_vocab_size}, needs {tokenizer} = null: a ready tokenizer has its size."
        yield Problem(vocab_size, text, (Fix(vocab_size, None),))
    if data.tokenizer_vocab_size is not None and data.tokens is not None and not data.sources:
        text = f"{vocab_size} = {data.tokenizer_vocab_size}, needs {sources}: there is no text to train a tokenizer on."
        yield Problem(vocab_size, text, (Fix(vocab_size, None),))
    if data.sources and data.tokenizer is None and data.tokenizer_vocab_size is None:
        text = f"{vocab_size} is null, needs the size of the tokenizer to train, or {tokenizer} the path of a ready one"
        yield Problem(vocab_size, text)


def _source(source: SourceConfig, prefix: str) -> Iterator[Problem]:
    key = f"{prefix}path"
    if source.kind == "python_stdlib" and source.path is not None:
        text = f"{key} = {shown(source.path)}, needs null: python_stdlib is the library of the running Python."
        yield Problem(key, text, (Fix(key, None),))
    if source.kind != "python_stdlib" and source.path is None:
        yield Problem(key, f"{key} is null, needs a file, folder or glob for kind {source.kind}")


def _run(config: RunConfig) -> Iterator[Problem]:
    if config.name.strip() and config.name.isprintable() and not FOLDER_NAME.fullmatch(config.name):
        rule = "needs letters, digits, '.', '_' and '-', at most 128: it becomes a folder"
        yield Problem("name", f"name = {shown(config.name)}, {rule}")
