"""A tree of nodes becomes the frozen dataclasses of the schema, or a list of everything that is wrong with it.

Strict: no key is ignored and no value is converted, except an integer where a number is asked for. Not the ranges of
the values: those are in `checks.py`.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megagrok.config.fields import homes_of, is_optional, nearest, section_class, settings_of, type_words, without_null
from megagrok.config.problems import Problem, is_secret_name, raise_problems, shown
from megagrok.config.schema import RunConfig
from megagrok.config.source import Entry, Listing, Node, Scalar, Section, kind_of, plain_node

T = TypeVar("T")

DEFAULT = "default"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain data, lists for tuples: what goes into a checkpoint and what `from_dict` reads."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def from_dict(plain: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """The configuration that `to_dict` wrote down, decoded as strictly as a file.

    source: what messages call the data.  Raises ConfigError that lists all problems.
    """
    problems: list[Problem] = []
    config = Decoder(problems).decode(plain_node(plain, source), RunConfig)
    raise_problems(problems, source)
    assert config is not None, "decoding failed without a problem"
    return config


class Decoder:
    """Collects problems and the provenance of each key while it decodes."""

    def __init__(self, problems: list[Problem], homes: Callable[[str], list[str]] = homes_of) -> None:
        """homes: the sections that have a setting of a name, for whoever put it into the wrong one."""
        self.problems = problems
        self.homes = homes
        self.provenance: dict[str, str] = {}

    def decode(self, root: Node, cls: type[T], key: str = "") -> T | None:
        """The instance of `cls` that `root` describes, or None with problems appended."""
        try:
            return self._section(root, cls, key)
        except _Refused:
            return None

    def _refuse(self, key: str, text: str, place: str) -> "_Refused":
        self.problems.append(Problem(key, text, (), place))
        return _Refused()

    def _section(self, node: Node, cls: type[T], key: str) -> T:
        if not isinstance(node, Section):
            raise self._refuse(key, f"{key} is {kind_of(node)}, needs a section (key: value lines)", node.place)
        settings = settings_of(cls)
        is_whole = True
        for name, entry in node.entries.items():
            if name not in settings:
                is_whole = False
                self._unknown(name, key, list(settings), entry)
        values: dict[str, object] = {}
        for name, setting in settings.items():
            path = f"{key}.{name}" if key else name
            found = node.entries.get(name)
            if found is None and setting.is_required:
                is_whole = False
                what = "the section" if section_class(setting.annotation) else "it"
                text = f"{path} is missing: {cls.__name__} has no default for {what}."
                self.problems.append(Problem(path, f"{text} {setting.doc}".rstrip(), (), node.place))
            elif found is None:
                self._note_defaults(setting.default, path)
            else:
                try:
                    values[name] = self._value(found, setting.annotation, path)
                except _Refused:
                    is_whole = False
        if not is_whole:
            raise _Refused
        return cls(**values)

    def _value(self, entry: Entry, annotation: Any, key: str) -> object:
        node = entry.node
        inner = section_class(annotation)
        if typing.get_origin(annotation) is tuple:
            self.provenance[key] = entry.place
            return self._listing(node, inner, key)
        if inner is not None:
            return self._section(node, inner, key)
        self.provenance[key] = entry.place
        if not isinstance(node, Scalar):
            raise self._refuse(key, f"{key} is {kind_of(node)}, needs {type_words(annotation)}", entry.place)
        if node.value is None and not node.surprise:
            if is_optional(annotation):
                return None
            raise self._refuse(key, f"{key} is null, needs {type_words(annotation)}", entry.place)
        return self._scalar(node, annotation, key, entry.place)

    def _listing(self, node: Node, cls: type | None, key: str) -> tuple[object, ...]:
        assert cls is not None, f"{key}: the schema has a list of plain values, which nothing decodes yet"
        if not isinstance(node, Listing):
            raise self._refuse(key, f"{key} is {kind_of(node)}, needs a list of sections", node.place)
        items = [self.decode(item, cls, f"{key}.{i}") for i, item in enumerate(node.items)]
        if any(item is None for item in items):
            raise _Refused
        return tuple(items)

    def _scalar(self, node: Scalar, annotation: Any, key: str, place: str) -> object:
        wanted = without_null(annotation)
        if typing.get_origin(wanted) is typing.Literal:
            return self._member(node, wanted, annotation, key, place)
        if node.surprise:
            raise self._refuse(key, f"{key} = {shown(node.text).strip(chr(39))}: {node.surprise}", place)
        value = node.value
        if type(value) is wanted:
            return value
        if wanted is float and type(value) is int:
            return _float_of(value)
        text = f"{key} = {kind_of(node)}, needs {type_words(annotation)}{_hint(node, wanted)}"
        raise self._refuse(key, text, place)

    def _member(self, node: Scalar, wanted: Any, annotation: Any, key: str, place: str) -> object:
        # An unquoted off is a boolean to YAML 1.1; among the members of an enum its text can mean only itself.
        members = typing.get_args(wanted)
        value = node.text if node.surprise else node.value
        for member in members:
            if type(value) is type(member) and value == member:
                return member
        meant = nearest(str(value), [str(member) for member in members])
        hint = f". Did you mean {meant}?" if meant else ""
        raise self._refuse(key, f"{key} = {shown(value)}, needs {type_words(annotation)}{hint}", place)

    def _unknown(self, name: str, section: str, names: list[str], entry: Entry) -> None:
        path = f"{section}.{name}" if section else name
        here = section or "the top level"
        homes = self.homes(name)
        similar = nearest(name, names)
        word = shown(name)
        if is_secret_name(name):
            advice = "keep it in the environment (WANDB_API_KEY, HF_TOKEN): configurations go into checkpoints and logs"
            text = f"{word} in {here} looks like the key of a secret: {advice}"
        elif homes:
            belongs = " or ".join(home or "the top level" for home in homes)
            text = f"{word} belongs under {belongs}, found under {here}"
        elif similar:
            text = f"unknown key {word} in {here}. Did you mean {similar!r}?"
        else:
            text = f"unknown key {word} in {here}. Known: {', '.join(names)}"
        self.problems.append(Problem(path, text, (), entry.place))

    def _note_defaults(self, default: object, key: str) -> None:
        if dataclasses.is_dataclass(default):
            for field in dataclasses.fields(default):
                self.provenance[f"{key}.{field.name}"] = DEFAULT
        else:
            self.provenance[key] = DEFAULT


class _Refused(Exception):
    """The value cannot be used; the problem that says why is already in the list."""


def _hint(node: Scalar, wanted: Any) -> str:
    """How the same value has to be written, where that can be known."""
    value = node.value
    if wanted is float and isinstance(value, str):
        written = _number_for_yaml(value)
        return f". YAML 1.1 reads {value} as text: write {written}" if written else ""
    if wanted is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f": write {int(value)}"
    if wanted is int and isinstance(value, str) and value.strip().isdecimal():
        return ": write it without quotes"
    if wanted is str and not isinstance(value, str):
        return ": write it in quotes"
    return ""


def _number_for_yaml(text: str) -> str:
    """The number in `text` as YAML 1.1 reads one (3e-4 -> 3.0e-4); empty if there is none."""
    try:
        float(text)
    except ValueError:
        return ""
    mantissa, letter, exponent = text.strip().lower().partition("e")
    if not mantissa.lstrip("+-").replace(".", "").isdecimal():
        return ""
    whole = mantissa if "." in mantissa else f"{mantissa}.0"
    signed = exponent if exponent[:1] in ("+", "-") else f"+{exponent}"
    return f"{whole}e{signed}" if letter else whole


def _float_of(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
