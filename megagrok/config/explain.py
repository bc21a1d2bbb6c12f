"""What a setting means, for a person who met its name: the docstring of the schema, type, default, value and origin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagrok.config.decode import to_dict
from megagrok.config.fields import Setting, all_settings, docstrings, nearest, section_class, type_words
from megagrok.config.load import Loaded
from megagrok.config.problems import shown
from megagrok.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Explanation:
    """One setting. `values` are (key, value, origin): several for a setting of list items, none without a run."""

    key: str
    type: str
    default: str
    doc: str
    values: tuple[tuple[str, str, str], ...]
    keys_below: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.key}: {self.type}", f"  {self.doc}"]
        if self.default:
            lines.append(f"  default: {self.default}")
        lines += [f"  {key} = {value}  ({origin})" for key, value, origin in self.values]
        if self.keys_below:
            lines.append("  settings: " + ", ".join(self.keys_below))
        return "\n".join(lines)


def explain(key: str, loaded: Loaded | None = None) -> Explanation:
    """The setting or section `key`, with its values in `loaded` if given.  Raises ConfigError if it is none."""
    schema_key = ".".join(part for part in key.split(".") if not part.isdecimal())
    setting = all_settings().get(schema_key)
    if setting is None:
        raise ConfigError(f"{shown(key)} is no setting.{_meant(schema_key)}")
    below = tuple(name.rpartition(".")[2] for name in all_settings() if name.rpartition(".")[0] == schema_key)
    values: tuple[tuple[str, str, str], ...] = ()
    if loaded is not None:
        values = tuple(
            (path, shown(value), origin) for path, value, origin in _values(loaded) if _is_at(path, key, schema_key)
        )
    return Explanation(key, type_words(setting.annotation), _default(setting), _doc(setting), values, below)


def reference() -> str:
    """All settings as one Markdown page: what `docs/configuration.md` holds."""
    page = "# Every setting\n\nWritten by `megagrok explain --all`; a test holds it against the code.\n"
    sections = [key for key, setting in all_settings().items() if section_class(setting.annotation)]
    return page + _table("") + "".join(f"\n## {key}\n\n{_doc(all_settings()[key])}\n{_table(key)}" for key in sections)


def _table(section: str) -> str:
    """The plain settings right below a section; "" is the top of the file."""
    rows = ["\n| setting | type | default | meaning |", "|---|---|---|---|"]
    for key, setting in all_settings().items():
        if key.rpartition(".")[0] == section and not section_class(setting.annotation):
            default = "(required)" if setting.is_required else _default(setting)
            cells = map(_cell, (f"`{key}`", type_words(setting.annotation), default, _doc(setting)))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _doc(setting: Setting) -> str:
    inner = section_class(setting.annotation)
    return setting.doc or (docstrings()[inner.__name__, ""] if inner else "")


def _default(setting: Setting) -> str:
    if setting.is_required:
        return "none, it has to be given"
    if section_class(setting.annotation):
        return "empty" if setting.default == () else ""
    return shown(setting.default)


def _values(loaded: Loaded) -> list[tuple[str, object, str]]:
    flat = _flat(to_dict(loaded.config), "")
    return [(key, value, loaded.provenance[key]) for key, value in flat.items()]


def _flat(plain: Mapping[str, Any], prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{key}.")
        elif isinstance(value, list) and value:
            for i, item in enumerate(value):
                flat |= _flat(item, f"{key}.{i}.")
        else:
            flat[key] = "empty" if value == [] else value
    return flat


def _is_at(path: str, key: str, schema_key: str) -> bool:
    without_numbers = ".".join(part for part in path.split(".") if not part.isdecimal())
    wanted = key if key != schema_key else schema_key
    found = path if key != schema_key else without_numbers
    return found == wanted or found.startswith(f"{wanted}.")


def _meant(key: str) -> str:
    known = all_settings()
    name = key.rpartition(".")[2]
    similar = nearest(key, known) or nearest(name, {setting.rpartition(".")[2] for setting in known})
    meant = [setting for setting in known if setting.rpartition(".")[2] == name]
    meant = meant or [setting for setting in known if similar in (setting, setting.rpartition(".")[2])]
    return f" Did you mean {' or '.join(meant)}?" if meant else f" Sections: {', '.join(_sections())}."


def _sections() -> list[str]:
    return [key for key, setting in all_settings().items() if section_class(setting.annotation) and "." not in key]
