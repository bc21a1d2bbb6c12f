"""What the schema says about itself: which key holds what type, where a key belongs, and the docstring of each field.

Not a second schema: everything is read from `schema.py`, the docstrings with `ast` from its source.
"""

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

from megagrok.config import schema
from megagrok.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one class of the schema. `default` is MISSING where the schema has none."""

    key: str
    annotation: Any
    default: object
    owner: str
    doc: str

    @property
    def is_required(self) -> bool:
        return self.default is MISSING


def settings_of(cls: type) -> Mapping[str, Setting]:
    """The fields of one class by name; their keys are the bare names."""
    hints = typing.get_type_hints(cls)
    docs = docstrings()
    return {
        field.name: Setting(
            key=field.name,
            annotation=hints[field.name],
            default=field.default_factory() if field.default_factory is not MISSING else field.default,
            owner=cls.__name__,
            doc=docs.get((cls.__name__, field.name), ""),
        )
        for field in dataclasses.fields(cls)
    }


@cache
def all_settings() -> Mapping[str, Setting]:
    """Every key of a run, sections too, in the schema's order. Items of a list have no number: data.sources.kind."""
    return {setting.key: setting for setting in _walk(RunConfig, "")}


@cache
def docstrings() -> Mapping[tuple[str, str], str]:
    """(class, field) -> the docstring below the field; (class, "") -> the docstring of the class."""
    docs: dict[tuple[str, str], str] = {}
    for cls in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        docs[cls.name, ""] = ast.get_docstring(cls) or ""
        for field, below in zip(cls.body, cls.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[cls.name, field.target.id] = inspect.cleandoc(text)
    return docs


def section_class(annotation: Any) -> type | None:
    """The dataclass behind a section or a list of sections; None for a plain setting."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def is_optional(annotation: Any) -> bool:
    """Whether null is a value of the type."""
    return isinstance(annotation, types.UnionType) and types.NoneType in typing.get_args(annotation)


def without_null(annotation: Any) -> Any:
    """The type of a value that is not null."""
    if not is_optional(annotation):
        return annotation
    (only,) = (item for item in typing.get_args(annotation) if item is not types.NoneType)
    return only


def type_words(annotation: Any) -> str:
    """The type as a message calls it."""
    if is_optional(annotation):
        return f"{type_words(without_null(annotation))}, or null"
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "a list of sections"
    if section_class(annotation):
        return "a section"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return words[annotation]


def homes_of(name: str) -> list[str]:
    """The sections that have a setting of this name; an empty string is the top level."""
    keys = [key for key in all_settings() if key.rpartition(".")[2] == name]
    return [key.rpartition(".")[0] for key in keys]


def nearest(name: str, names: typing.Iterable[str]) -> str | None:
    """The most similar of `names`, if any is similar at all."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _walk(cls: type, prefix: str) -> Iterator[Setting]:
    for name, setting in settings_of(cls).items():
        key = f"{prefix}{name}"
        yield dataclasses.replace(setting, key=key)
        inner = section_class(setting.annotation)
        if inner is not None:
            yield from _walk(inner, f"{key}.")
