"""`explain` says what the schema says, and where a value came from."""

from pathlib import Path

import pytest

from megagrok.config import explain, load_config
from megagrok.config.fields import all_settings
from megagrok.errors import ConfigError


@pytest.mark.parametrize("key", sorted(all_settings()))
def test_every_setting_and_section_can_be_explained(key: str, tiny_path: Path) -> None:
    explanation = explain(key, load_config(tiny_path))
    assert explanation.doc
    assert key in str(explanation)


def test_an_explanation_has_meaning_type_default_value_and_origin(tiny_path: Path) -> None:
    text = str(explain("model.moe.top_k", load_config(tiny_path, ["model.moe.top_k=1"])))
    assert "Experts that each token visits." in text
    assert "an integer" in text
    assert "it has to be given" in text
    assert "model.moe.top_k = 1  (override)" in text


def test_a_section_is_explained_with_its_settings() -> None:
    assert {"tensor", "zero"} <= set(explain("parallel").keys_below)


def test_items_of_a_list_are_explained_with_and_without_their_number(tiny_path: Path) -> None:
    loaded = load_config(tiny_path)
    assert explain("data.sources.kind", loaded).values == explain("data.sources.0.kind", loaded).values
    assert len(explain("data.sources.kind", loaded).values) == 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tensr", "parallel.tensor"),
        ("top_k", "model.moe.top_k"),
        ("optimizer.learning", "Did you mean"),
        ("?", "Sections: "),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        explain(key)
