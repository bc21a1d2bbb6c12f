"""Where a value comes from: bases, the file, overrides; and that every accepted value is the one that was written."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.config import decode_config, from_dict, is_model_file, load_config, load_model_config, to_dict
from megagrok.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_override_wins_over_the_file_and_the_file_over_its_bases(tmp_path: Path, tiny_text: str) -> None:
    write(tmp_path, "parts/a.yaml", tiny_text)
    write(tmp_path, "parts/b.yaml", "train: {steps: 20, seq_len: 64, micro_batch: 2}")
    path = write(tmp_path, "run.yaml", "base: [parts/a.yaml, parts/b.yaml]\ntrain: {seq_len: 16}\n")
    loaded = load_config(path, ["train.micro_batch=4"])
    train = loaded.config.train
    assert (train.steps, train.seq_len, train.micro_batch, train.global_batch) == (20, 16, 4, 8)
    assert loaded.provenance["train.steps"] == f"{tmp_path}/parts/b.yaml:1"
    assert loaded.provenance["train.seq_len"] == f"{path}:2"
    assert loaded.provenance["train.micro_batch"] == "override"
    assert loaded.provenance["train.global_batch"] == f"{tmp_path}/parts/a.yaml:17"
    assert loaded.provenance["train.seed"] == "default"


def test_a_base_is_found_beside_the_file_that_names_it(tmp_path: Path, tiny_text: str) -> None:
    write(tmp_path, "model/deep.yaml", tiny_text)
    write(tmp_path, "model/upper.yaml", "base: deep.yaml\nname: upper")
    path = write(tmp_path, "run/r.yaml", "base: ../model/upper.yaml")
    assert load_config(path).config.name == "upper"


def test_a_base_may_be_shared_but_not_its_own(tmp_path: Path, tiny_text: str) -> None:
    write(tmp_path, "a.yaml", tiny_text)
    write(tmp_path, "b.yaml", "base: a.yaml")
    assert load_config(write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]")).config.name == "t"
    write(tmp_path, "x.yaml", "base: y.yaml")
    with pytest.raises(ConfigError, match=r"^base: .*y.yaml is a base of itself \(.*x.yaml:1\)$"):
        load_config(write(tmp_path, "y.yaml", "base: x.yaml"))


def test_provenance_has_every_setting_once(tiny_path: Path) -> None:
    loaded = load_config(tiny_path)

    def keys(plain: object, prefix: str) -> set[str]:
        if isinstance(plain, dict):
            return {key for name, item in plain.items() for key in keys(item, f"{prefix}.{name}" if prefix else name)}
        if isinstance(plain, list):
            return {prefix} | {key for i, item in enumerate(plain) for key in keys(item, f"{prefix}.{i}")}
        return {prefix}

    assert set(loaded.provenance) == keys(to_dict(loaded.config), "")


def test_a_list_is_replaced_as_a_whole(tiny_path: Path) -> None:
    override = "data.sources=[{kind: text, path: a.txt}, {kind: jsonl, path: b.jsonl}]"
    sources = load_config(tiny_path, [override]).config.data.sources
    assert [source.path for source in sources] == ["a.txt", "b.jsonl"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=3.0e-4", 3.0e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=.5", 0.5),
        ("train.steps=1_000", 1000),
        ("train.steps=0x10", 16),
        ("train.deterministic=true", True),
        ("model.final_softcap=null", None),
        ("model.final_softcap=", None),
        ("telemetry.wandb=off", "off"),
        ("telemetry.wandb='off'", "off"),
        ("parallel.zero=0", 0),
        ("name=a-b.c", "a-b.c"),
        ('name="1234"', "1234"),
        ("data.cache=/scratch/a=b", "/scratch/a=b"),
        ("data.cache=/größe/語", "/größe/語"),
    ],
)
def test_an_override_is_read_as_yaml(tiny_path: Path, override: str, value: object) -> None:
    plain: object = to_dict(load_config(tiny_path, [override]).config)
    for name in override.partition("=")[0].split("."):
        assert isinstance(plain, dict)
        plain = plain[name]
    assert plain == value
    assert type(plain) is type(value)


def test_a_model_file_is_told_from_a_run(tiny_path: Path) -> None:
    model_path = tiny_path.parents[1] / "model" / "tiny.yaml"
    assert is_model_file(model_path)
    assert not is_model_file(tiny_path)
    assert load_model_config(model_path) == load_model_config(tiny_path) == load_config(tiny_path).config.model
    assert load_model_config(model_path, ["model.moe.top_k=1"]).moe.top_k == 1


def test_an_override_that_a_model_cannot_read_is_refused(tiny_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'train\.steps=3': only settings under model are read here"):
        load_model_config(tiny_path, ["train.steps=3"])


def test_what_is_missing_is_told_at_the_file_that_has_the_section(tmp_path: Path, tiny_text: str) -> None:
    path = write(tmp_path, "run.yaml", tiny_text.replace("  seq_len: 32\n", ""))
    with pytest.raises(ConfigError, match=rf"train\.seq_len is missing: .*\({path}:15\)$"):
        load_config(path, ["train.steps=3"])


def test_plain_data_is_decoded_as_strictly_as_a_file(tiny_path: Path) -> None:
    plain = to_dict(load_config(tiny_path).config)
    plain["train"]["steps"] = True
    plain["optimizer"]["momentum"] = 0.9
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems in run\.json.*train\.steps = true, needs an integer.*momentum"
    ):
        from_dict(plain, "run.json")


@settings(deadline=None)
@given(
    lr=st.floats(min_value=1e-30, max_value=1e30),
    steps=st.integers(1, 2**53),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_what_was_written_down_is_read_back(lr: float, steps: int, name: str) -> None:
    config = decode_config(Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml").config
    changed = dataclasses.replace(
        config,
        name=name,
        train=dataclasses.replace(config.train, steps=steps),
        optimizer=dataclasses.replace(config.optimizer, lr=lr),
    )
    assert from_dict(to_dict(changed)) == changed
