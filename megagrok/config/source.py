"""YAML text as a tree of nodes that remember where they were written. Not the settings: nothing here knows the schema.

The text is composed, never constructed: no tag in a file can make an object. Only the plain scalars of YAML 1.1 are
read, and those that it turns into something else than what stands there (no, 010, 12:30, 2026-01-01) keep a note
saying so, which the decoder reports where the value is used.
"""

import difflib
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megagrok.config.problems import Plain, Problem, shown

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 32
YAML_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `surprise` says how YAML 1.1 misreads `text`; such a value is used by no setting but an enum."""

    value: Plain
    text: str
    place: str
    surprise: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """A YAML sequence or a JSON list."""

    items: tuple["Node", ...]
    place: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value, and where the key stands."""

    node: "Node"
    place: str


@dataclass(frozen=True, slots=True)
class Section:
    """A YAML mapping or a JSON object."""

    entries: Mapping[str, Entry]
    place: str


Node = Scalar | Listing | Section


def read_file(path: Path, problems: list[Problem]) -> Section | None:
    """The tree of one file; None, with a problem appended, if the file as a whole cannot be used."""
    source = str(path)
    text = _read_text(path, problems)
    if text is None:
        return None
    node = read_text(text, source, problems)
    if isinstance(node, Section):
        return node
    if node is not None:
        problems.append(Problem("", f"{source}: needs sections like 'model:' at its top, has {kind_of(node)}"))
    return None


def read_text(text: str, source: str, problems: list[Problem], key: str = "") -> Node | None:
    """The tree of YAML text; None, with a problem appended, if there is none.

    key: where an override puts the text; such text has no lines to tell apart, so places are `source` alone.
    """
    try:
        root = _BoundedLoader(text).get_single_node()
    except _TooMuch as error:
        problems.append(Problem("", f"{source}: {error}"))
        return None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark is not None and not key else source
        problems.append(Problem("", f"{where}: not valid YAML: {error.problem or error.context}"))
        return None
    except yaml.reader.ReaderError as error:
        problems.append(Problem("", f"{source}: character {error.position} is {error.character!r}: {error.reason}"))
        return None
    if root is None:
        problems.append(Problem("", f"{source}: empty, needs at least one setting"))
        return None
    try:
        return _Walk(source, not key, problems).node(root, key, 0)
    except _TooMuch as error:
        problems.append(Problem("", f"{source}: {error}"))
        return None


def plain_node(value: object, place: str) -> Node:
    """The tree of plain data (from JSON, or of `to_dict`). Raises TypeError for anything else: a bug of the caller."""
    if isinstance(value, Mapping):
        return Section({str(key): Entry(plain_node(item, place), place) for key, item in value.items()}, place)
    if isinstance(value, str | int | float | bool) or value is None:
        return Scalar(value, str(value), place)
    if isinstance(value, Sequence):
        return Listing(tuple(plain_node(item, place) for item in value), place)
    raise TypeError(f"{place}: {type(value).__name__} is not plain data")


def kind_of(node: Node) -> str:
    """What a message calls this node."""
    if isinstance(node, Section):
        return "a section"
    if isinstance(node, Listing):
        return "a list"
    return shown(node.value) if not isinstance(node.value, str) else f"{shown(node.value)} (text)"


class _TooMuch(Exception):
    """The text is larger or deeper than a configuration can be."""


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes and stops at MAX_NODES and MAX_DEPTH, before the recursion of PyYAML does."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.num_nodes = 0
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_nodes += 1
        self.depth += 1
        if self.num_nodes > MAX_NODES:
            raise _TooMuch(f"has over {MAX_NODES:,} values")
        if self.depth > MAX_DEPTH:
            raise _TooMuch(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Walk:
    """Copies PyYAML's nodes, which share what an alias names, into a tree, which does not."""

    def __init__(self, source: str, with_lines: bool, problems: list[Problem]) -> None:
        self.source = source
        self.with_lines = with_lines
        self.problems = problems
        self.num_nodes = 0

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.with_lines else self.source

    def node(self, node: yaml.Node, key: str, depth: int) -> Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _TooMuch(f"alias expansion over {MAX_NODES:,} values")
        if depth > MAX_DEPTH:
            raise _TooMuch("an alias contains itself")
        place = self.place(node)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, place)
        if node.tag not in (YAML_TAG + "map", YAML_TAG + "seq"):
            self.problems.append(Problem(key, f"{key or 'the file'}: tag {node.tag!r} is not allowed", (), place))
        if isinstance(node, yaml.SequenceNode):
            items = tuple(self.node(item, f"{key}.{i}", depth + 1) for i, item in enumerate(node.value))
            return Listing(items, place)
        return self.section(node, key, depth)

    def section(self, node: yaml.Node, key: str, depth: int) -> Section:
        entries: dict[str, Entry] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            name = key_node.value
            if not isinstance(name, str):
                self.problems.append(Problem(key, f"{key or 'the file'}: a key has to be a word", (), place))
                continue
            path = f"{key}.{name}" if key else name
            line = key_node.start_mark.line + 1
            if name in entries:
                self.problems.append(Problem(path, f"{path} given twice (lines {lines[name]}, {line})", (), place))
            elif key_node.tag == YAML_TAG + "merge":
                self.problems.append(Problem(path, f"{path}: merge keys are not read. Use base: FILE", (), place))
            else:
                lines[name] = line
                entries[name] = Entry(self.node(value_node, path, depth + 1), place)
        return Section(entries, self.place(node))


def _scalar(node: yaml.ScalarNode, place: str) -> Scalar:
    """The value YAML 1.1 means; where that is not what a reader sees, a surprise."""
    text = node.value
    match node.tag.removeprefix(YAML_TAG):
        case "str":
            return Scalar(text, text, place)
        case "null":
            return Scalar(None, text, place)
        case "bool" if text.lower() in ("true", "false"):
            return Scalar(text.lower() == "true", text, place)
        case "bool":
            reading = "true" if text.lower() in ("yes", "on", "y") else "false"
            return Scalar(
                text, text, place, f"YAML 1.1 reads it as {reading}: write true or false, or {text!r} in quotes"
            )
        case "int":
            return _integer(text, place)
        case "float":
            return _number(text, place)
        case "timestamp":
            return Scalar(text, text, place, "YAML 1.1 reads it as a date: write it in quotes")
        case tag:
            return Scalar(text, text, place, f"tag {tag!r} is not allowed")


def _integer(text: str, place: str) -> Scalar:
    if ":" in text:
        return Scalar(text, text, place, "YAML 1.1 reads it in base 60: write it in quotes, or as one number")
    if re.fullmatch(r"[-+]?0[0-7_]+", text):
        return Scalar(text, text, place, "YAML 1.1 reads it as octal: write it without the leading 0")
    try:
        return Scalar(int(text.replace("_", ""), 0), text, place)
    except ValueError:
        return Scalar(text, text, place, "not an integer that can be read")


def _number(text: str, place: str) -> Scalar:
    if ":" in text:
        return Scalar(text, text, place, "YAML 1.1 reads it in base 60: write it in quotes, or as one number")
    plain = text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
    try:
        return Scalar(float(plain), text, place)
    except ValueError:
        return Scalar(text, text, place, "not a number that can be read")


def _read_text(path: Path, problems: list[Problem]) -> str | None:
    try:
        status = path.stat()
        size = status.st_size
        if size > MAX_BYTES:
            problems.append(Problem("", f"{path}: {size:,} bytes, a configuration has at most {MAX_BYTES:,} (1 MiB)"))
            return None
        # A device would never end and a pipe might never begin; a folder says so itself.
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            problems.append(Problem("", f"{path}: is a device or a pipe, needs a file"))
            return None
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(Problem("", f"{path}: cannot be read: {reason}.{_similar_file(path)}"))
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = " (UTF-16: convert it with iconv)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        problems.append(Problem("", f"{path}: not UTF-8, byte {error.start} is 0x{data[error.start]:02x}{hint}"))
        return None


def _similar_file(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return ""
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
