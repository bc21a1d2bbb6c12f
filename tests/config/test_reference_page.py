"""The page of all settings says what the schema says."""

from pathlib import Path

from megagrok.config import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_of_settings_is_the_one_that_explain_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "megagrok explain --all > docs/configuration.md"
