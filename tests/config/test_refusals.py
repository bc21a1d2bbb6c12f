"""What a file or an override can get wrong, and the sentence that says so. Each row is a law: this input, this text."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagrok.config import load_config
from megagrok.errors import EXIT_BUG, ConfigError

OVERRIDES = [
    # numbers and text (27, 31)
    ("optimizer.lr=3e-4", "optimizer.lr = '3e-4' (text), needs a number. YAML 1.1 reads 3e-4 as text: write 3.0e-4"),
    ("optimizer.lr=1.5e8", "write 1.5e+8"),
    ("optimizer.lr='0.1'", "optimizer.lr = '0.1' (text), needs a number"),
    ("optimizer.lr=fast", "optimizer.lr = 'fast' (text), needs a number"),
    ("optimizer.lr=true", "optimizer.lr = true, needs a number"),
    ("optimizer.lr=null", "optimizer.lr is null, needs a number"),
    ("optimizer.lr=", "optimizer.lr is null, needs a number"),
    ("optimizer.lr=[1.0]", "optimizer.lr is a list, needs a number"),
    ("optimizer.lr={a: 1}", "optimizer.lr is a section, needs a number"),
    ("train.steps=8.0", "train.steps = 8.0, needs an integer: write 8"),
    ("train.steps=8.5", "train.steps = 8.5, needs an integer"),
    ("train.steps=true", "train.steps = true, needs an integer"),
    ("parallel.tensor='8'", "parallel.tensor = '8' (text), needs an integer: write it without quotes"),
    ("train.deterministic=1", "train.deterministic = 1, needs true or false"),
    ("name=2026", "name = 2026, needs text: write it in quotes"),
    ("name=true", "name = true, needs text: write it in quotes"),
    ("data.tokenizer_vocab_size=many", "needs an integer, or null"),
    ("train=3", "train is 3, needs a section"),
    ("train=[]", "train is a list, needs a section"),
    ("data.sources=text", "data.sources is 'text' (text), needs a list of sections"),
    ("data.sources=[text]", "data.sources.0 is 'text' (text), needs a section"),
    ("data.sources=[{path: x}]", "data.sources.0.kind is missing"),
    # enums
    ("schedule.kind=wds", "schedule.kind = 'wds', needs one of constant, wsd, cosine. Did you mean wsd?"),
    ("train.precision=fp64", "train.precision = 'fp64', needs one of fp32, bf16, fp8"),
    ("parallel.zero=3", "parallel.zero = 3, needs one of 0, 1, 2"),
    ("parallel.zero=true", "parallel.zero = true, needs one of 0, 1, 2"),
    ("telemetry.wandb=no", "telemetry.wandb = 'no', needs one of off, offline, online"),
    # what YAML 1.1 reads otherwise (28)
    ("name=no", "name = no: YAML 1.1 reads it as false"),
    ("train.deterministic=on", "train.deterministic = on: YAML 1.1 reads it as true: write true or false"),
    ("train.steps=010", "train.steps = 010: YAML 1.1 reads it as octal"),
    ("train.steps=1:30", "train.steps = 1:30: YAML 1.1 reads it in base 60"),
    ("optimizer.lr=1:30.5", "optimizer.lr = 1:30.5: YAML 1.1 reads it in base 60"),
    ("name=2026-11-23", "name = 2026-11-23: YAML 1.1 reads it as a date"),
    ("name=!!python/name:os.system x", "name = x: tag 'python/name:os.system' is not allowed"),
    ("name=!!binary aGk=", "tag 'binary' is not allowed"),
    (
        "data.sources=!!python/object/apply:os.system []",
        "tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    ),
    ("train.steps=" + "9" * 5000, "not an integer that can be read"),
    # keys (29, 30) and the form of an override
    ("optimizer.weight_decey=0.1", "unknown key 'weight_decey' in optimizer. Did you mean 'weight_decay'?"),
    ("optimizer.nesterov=true", "unknown key 'nesterov' in optimizer. Known: lr, beta1"),
    ("model.lr=0.1", "'lr' belongs under optimizer, found under model"),
    ("lr=0.1", "'lr' belongs under optimizer, found under the top level"),
    ("moe.top_k=2", "'moe' belongs under model, found under the top level"),
    ("optimizer.kind=adam", "'kind' belongs under data.sources or schedule, found under optimizer"),
    ("base=other.yaml", "unknown key 'base' in the top level"),
    ("train.steps", "override 'train.steps': needs the form section.key=value"),
    ("=3", "override '=3': needs the form section.key=value"),
    ("train..steps=3", "override 'train..steps=3': needs the form section.key=value"),
    ("train.steps.more=3", "train.steps is a section, needs an integer"),
    ("train.steps=[1", "override train.steps: not valid YAML"),
    ("hf_" + "a" * 30, "override (a secret, not shown): needs the form"),
    # ranges (26, 63 and the counts)
    ("optimizer.lr=-3.0e-4", "optimizer.lr = -0.0003, needs > 0"),
    ("optimizer.lr=.nan", "optimizer.lr = nan, needs a finite number"),
    ("optimizer.lr=1.0e+999", "optimizer.lr = inf, needs a finite number"),
    ("optimizer.beta1=1", "optimizer.beta1 = 1.0, needs >= 0 and < 1"),
    ("optimizer.beta2=-0.1", "optimizer.beta2 = -0.1, needs >= 0 and < 1"),
    ("optimizer.eps=0", "optimizer.eps = 0.0, needs > 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1.0, needs >= 0"),
    ("optimizer.clip_norm=-.inf", "optimizer.clip_norm = -inf, needs a finite number"),
    ("schedule.min_lr=-1", "schedule.min_lr = -1.0, needs >= 0"),
    ("model.final_softcap=0", "model.final_softcap = 0.0, needs > 0, or null for none"),
    ("model.attention_temperature_positions=1", "needs >= 2: logits are divided by its logarithm. Fix:"),
    ("data.held_out_fraction=1", "data.held_out_fraction = 1.0, needs > 0 and < 1"),
    (
        "checkpoint.keep=1",
        "checkpoint.keep = 1, needs >= 2: a bad newest checkpoint would end the run. Fix: checkpoint.keep = 2.",
    ),
    ("train.steps=0", "train.steps = 0, needs >= 1"),
    ("train.seed=-1", "train.seed = -1, needs >= 0"),
    ("train.steps=9007199254740993", "needs <= 9,007,199,254,740,992"),
    ("parallel.tensor=0", "parallel.tensor = 0, needs >= 1"),
    # what fields of one section break together
    ("model.moe.top_k=8", "model.moe.top_k = 8, needs <= model.moe.num_experts (4). Fix: model.moe.top_k = 4."),
    (
        "model.num_kv_heads=3",
        "model.num_heads = 4, needs a multiple of model.num_kv_heads (3). Fix: model.num_kv_heads in {4, 2, 1}.",
    ),
    (
        "model.num_kv_heads=8",
        "model.num_heads = 4, needs a multiple of model.num_kv_heads (8). Fix: model.num_kv_heads in {4, 2, 1}.",
    ),
    ("model.head_dim=15", "model.head_dim = 15, needs an even number"),
    (
        "train.batch_ramp=[{until_samples: 8, global_batch: 8}]",
        "train.batch_ramp.0.global_batch = 8, needs < train.global_batch (8)",
    ),
    (
        "train.batch_ramp=[{until_samples: 8, global_batch: 4}, {until_samples: 8, global_batch: 6}]",
        "train.batch_ramp.1.until_samples = 8, needs > 8, where the stage begins",
    ),
    (
        "train.batch_ramp=[{until_samples: 8, global_batch: 4}, {until_samples: 9, global_batch: 4}]",
        "train.batch_ramp.1.global_batch = 4, needs > 4, the stage before it",
    ),
    ("data.tokens=null", "data.sources is empty and data.tokens is null, needs exactly one of them"),
    (
        "data={sources: [{kind: python_stdlib}], tokens: x, tokenizer: t.json}",
        "data.tokens and data.sources are both given, needs exactly one. Fix: data.tokens = null.",
    ),
    (
        "data.tokenizer_vocab_size=300",
        "there is no text to train a tokenizer on. Fix: data.tokenizer_vocab_size = null.",
    ),
    ("data={sources: [{kind: text, path: a}], tokens: null}", "data.tokenizer_vocab_size is null, needs the size"),
    ("data={sources: [{kind: text}], tokens: null, tokenizer: t.json}", "data.sources.0.path is null, needs a file"),
    (
        "data={sources: [{kind: python_stdlib, path: a}], tokens: null, tokenizer: t.json}",
        "needs null: python_stdlib is the library of the running Python. Fix: data.sources.0.path = null.",
    ),
    (
        "data={sources: [{kind: text, path: a}], tokens: null, tokenizer: t.json, tokenizer_vocab_size: 300}",
        "needs data.tokenizer = null: a ready tokenizer has its size",
    ),
    (
        "data={sources: [{kind: python_stdlib}], tokens: null, tokenizer_vocab_size: 100}",
        "needs >= 257: 256 bytes and the end of a document",
    ),
    # paths and secrets (72, 73)
    ("data.tokens=$UNSET/run", "data.tokens = $UNSET/run: UNSET is not set"),
    ("runs_dir=/scratch/${USER}/run", "runs_dir = /scratch/${USER}/run: USER is not set"),
    ("data.cache=~/cache", "data.cache = ~/cache: ~ is not expanded"),
    ('data.cache="a\\nb"', "a path has no control character such as '\\n'"),
    ('data.cache="a\\0b"', "a path has no control character such as '\\x00'"),
    ("data.cache=''", "data.cache is empty, needs a path"),
    ("data.cache=" + "a" * 256, "256 bytes, the longest part 256; a path has at most 3,500, each part 255"),
    ("data.cache=" + "ab/" * 1200, "3,600 bytes, the longest part 2; a path has at most 3,500, each part 255"),
    ("name=a/b", "name = 'a/b', needs letters, digits"),
    ("name=../x", "name = '../x', needs letters, digits"),
    ("name=-rf", "name = '-rf', needs letters, digits"),
    ("name=" + "a" * 129, "at most 128: it becomes a folder"),
    ("name=' '", "name = ' ', needs printable text"),
    ('telemetry.wandb_project="a\\nb"', "telemetry.wandb_project = 'a\\nb', needs printable text"),
    ("telemetry.wandb_project=" + "0123456789abcdef" * 2 + "01234567", "telemetry.wandb_project looks like a secret"),
    ("data.cache=https://user:hunter2@host/x", "data.cache looks like a secret"),
    ("name=hf_" + "aB3" * 10, "name looks like a secret"),
    ("optimizer.lr=sk-" + "aB3" * 10, "optimizer.lr = (a secret, not shown) (text), needs a number"),
    ("telemetry.wandb_api_key=hunter2", "'wandb_api_key' in telemetry looks like the key of a secret: keep it in the"),
    ("HF_TOKEN=hunter2", "'HF_TOKEN' in the top level looks like the key of a secret"),
    ("data.password=hunter2", "'password' in data looks like the key of a secret"),
]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(tiny_text)
    return file


@pytest.mark.parametrize(("override", "text"), OVERRIDES, ids=[override[:60] for override, _ in OVERRIDES])
def test_a_wrong_value_is_refused_with_its_rule(path: Path, override: str, text: str) -> None:
    message = refusal(path, override)
    assert text in message
    assert "problems in" not in message, "one mistake, one problem"


def changed(old: str, new: str) -> Callable[[str], bytes]:
    def change(text: str) -> bytes:
        assert old in text
        return text.replace(old, new).encode()

    return change


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]" for before, after in zip("abcdef", "bcdefg", strict=True)
)

FILES: list[tuple[str, Callable[[str], bytes], str]] = [
    ("duplicate", changed("  steps: 10\n", "  steps: 10\n  steps: 11\n"), "train.steps given twice (lines 15, 16)"),
    ("duplicate section", lambda text: (text + "train: {}\n").encode(), "train given twice (lines 14, 27)"),
    (
        "missing",
        changed("  lr: 1.0e-2\n", "  beta1: 0.9\n"),
        "optimizer.lr is missing: OptimizerConfig has no default for it. Peak",
    ),
    (
        "missing section",
        changed("checkpoint:\n  every_steps: 5\n", ""),
        "checkpoint is missing: RunConfig has no default",
    ),
    ("unknown", changed("  lr: 1.0e-2", "  lr: 1.0e-2\n  clip_nrom: 1"), "Did you mean 'clip_norm'? (FILE:23)"),
    ("text for number", changed("1.0e-2", "1e-2"), "write 1.0e-2 (FILE:22)"),
    ("empty", lambda _: b"", "FILE: empty, needs at least one setting"),
    ("only comments", lambda _: b"# nothing\n", "FILE: empty"),
    ("a list", lambda _: b"- a\n- b\n", "FILE: needs sections like 'model:' at its top, has a list"),
    ("a word", lambda _: b"model\n", "has 'model' (text)"),
    ("binary", lambda _: b"\x89PNG\r\n\x1a\n", "FILE: not UTF-8, byte 0 is 0x89"),
    ("latin-1", lambda text: b"# caf\xe9\n" + text.encode(), "FILE: not UTF-8, byte 5 is 0xe9"),
    ("utf-16", lambda text: text.encode("utf-16"), "0xff (UTF-16: convert it with iconv)"),
    ("NUL", changed("name: t", "name: t\0"), "special characters are not allowed"),
    ("too large", lambda text: (text + "#" * (1 << 20)).encode(), "a configuration has at most 1,048,576 (1 MiB)"),
    ("alias bomb", lambda _: BOMB.encode(), "FILE: alias expansion over 10,000 values"),
    ("recursive alias", lambda _: b"a: &a [*a]", "FILE: an alias contains itself"),
    ("many values", lambda _: b"a: [" + b"1," * 20_000 + b"]", "FILE: has over 10,000 values"),
    ("deep", lambda _: b"[" * 5000, "FILE: nested deeper than 32"),
    ("unknown alias", lambda _: b"a: *b", "FILE:1: not valid YAML: found undefined alias 'b'"),
    ("tab", changed("  steps", "\tsteps"), "FILE:15: not valid YAML"),
    (
        "two documents",
        lambda text: f"{text}---\n{text}".encode(),
        "FILE:27: not valid YAML: but found another document",
    ),
    (
        "merge key",
        lambda text: (text + "telemetry:\n  <<: {wandb: offline}\n").encode(),
        "telemetry.<<: merge keys are not read",
    ),
    ("key is a list", lambda text: (text + "? [a]\n: 1\n").encode(), "the file: a key has to be a word (FILE:27)"),
    (
        "tag",
        lambda text: (text + "telemetry: !!python/object:x.Y {}\n").encode(),
        "python/object:x.Y' is not allowed (FILE:27)",
    ),
    ("no base", lambda text: f"base: no.yaml\n{text}".encode(), "no.yaml: cannot be read: No such file or directory."),
    ("similar base", lambda text: f"base: rum.yaml\n{text}".encode(), "Did you mean FILE?"),
    (
        "base is a number",
        lambda text: f"base: 3\n{text}".encode(),
        "base is 3, needs a file or a list of files (FILE:1)",
    ),
    ("base with $", lambda text: f"base: $X/a.yaml\n{text}".encode(), "X is not set"),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_wrong_file_is_refused_at_its_line(
    path: Path, tiny_text: str, change: Callable[[str], bytes], text: str
) -> None:
    path.write_bytes(change(tiny_text))
    message = refusal(path)
    assert text.replace("FILE", str(path)) in message
    assert "problems in" not in message, "one mistake, one problem"


def test_a_missing_file_names_a_similar_one(path: Path) -> None:
    assert f"Did you mean {path}?" in refusal(path.with_name("runs.yaml"))
    assert "Is a directory" in refusal(path.parent)


def test_all_problems_are_told_at_once_one_a_line(path: Path) -> None:
    message = refusal(path, "optimizer.lr=3e-4", "train.steps=true", "parallel.tensr=2", "train.seed=1", "train.seed=2")
    head, *lines = message.splitlines()
    assert head == f"4 problems in {path}:"
    assert len(lines) == 4


def test_no_message_shows_a_secret(path: Path, tiny_text: str) -> None:
    secret = "hf_" + "Qx7" * 10
    path.write_text(tiny_text + f"{secret}: 1\ntelemetry:\n  wandb: {secret}\n  log_every_steps: {secret}\n")
    message = refusal(path, f"name={secret}", f"train.steps={secret}", secret)
    assert "5 problems" in message or "6 problems" in message
    assert secret not in message


def test_a_refusal_tells_the_scheduler_not_to_requeue() -> None:
    assert ConfigError.exit_code == 2 != EXIT_BUG


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), at=st.integers(0, 600), cut=st.integers(0, 40))
@example(data=b"!!int abc", at=6, cut=1)
@example(data=b": : :", at=0, cut=0)
@example(data=b"? ", at=0, cut=0)
@example(data=b"=", at=6, cut=1)
def test_no_bytes_end_in_anything_but_a_configuration_or_a_refusal(
    path: Path, tiny_text: str, data: bytes, at: int, cut: int
) -> None:
    text = tiny_text.encode()
    path.write_bytes(text[:at] + data + text[at + cut :])
    try:
        load_config(path)
    except ConfigError as error:
        assert str(error)
    finally:
        path.write_text(tiny_text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["model", "model.moe", "train.batch_ramp", "data.sources", "name", "optimizer.lr", "x.y"]),
    value=VALUES,
)
def test_no_override_ends_in_anything_but_a_configuration_or_a_refusal(path: Path, key: str, value: object) -> None:
    try:
        load_config(path, [f"{key}={value!r}"])
    except ConfigError as error:
        assert str(error)
