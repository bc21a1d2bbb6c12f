"""From a file and overrides to the configuration of a run, with the origin of every value.

Sources in order, later wins: the files named by `base:`, the file itself, overrides such as train.steps=20. Nothing
else: no environment, no search path. Lists are replaced as a whole.
"""

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrok.config.checks import field_problems, path_problem
from megagrok.config.decode import Decoder
from megagrok.config.problems import Problem, placed, raise_problems, shown
from megagrok.config.schema import ModelConfig, RunConfig
from megagrok.config.source import Entry, Listing, Node, Scalar, Section, kind_of, read_file, read_text

BASE = "base"
OVERRIDE = "override"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and for each dotted key the file:line it was written at, "override", or "default"."""

    config: RunConfig
    provenance: Mapping[str, str]


def load_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration of a run, decoded and with every field in its range.

    What several fields break together is `megagrok.plan.check`'s.  Raises ConfigError that lists all problems.
    """
    loaded = decode_config(path, overrides)
    raise_problems(placed(field_problems(loaded.config), loaded.provenance), str(path))
    return loaded


def decode_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """As `load_config`, without the ranges: for a caller who checks those together with everything else."""
    problems: list[Problem] = []
    tree = _read_tree(path, overrides, problems)
    decoder = Decoder(problems)
    config = decoder.decode(tree, RunConfig) if tree is not None else None
    raise_problems(problems, str(path))
    assert config is not None, "decoding failed without a problem"
    return Loaded(config, decoder.provenance)


def load_model_config(path: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The `model:` section of a file, of a model or of a run.  Raises ConfigError that lists all problems."""
    problems: list[Problem] = []
    tree = _read_tree(path, overrides, problems)
    decoder = Decoder(problems)
    model = None
    for override in overrides:
        if not override.startswith("model."):
            problems.append(Problem("", f"override {shown(override)}: only settings under model are read here"))
    if tree is not None and "model" not in tree.entries:
        problems.append(Problem("model", f"{path}: has no section 'model:'"))
    elif tree is not None:
        model = decoder.decode(tree.entries["model"].node, ModelConfig, "model")
    if model is not None:
        problems += placed(field_problems(model, "model"), decoder.provenance)
    raise_problems(problems, str(path))
    assert model is not None, "decoding failed without a problem"
    return model


def is_model_file(path: Path) -> bool:
    """Whether the file describes a model and no run: `model:` is all it has.  Raises ConfigError if it is not YAML."""
    problems: list[Problem] = []
    tree = _read_tree(path, (), problems)
    raise_problems(problems if tree is None else [], str(path))
    return tree is not None and set(tree.entries) == {"model"}


def _read_tree(path: Path, overrides: Sequence[str], problems: list[Problem]) -> Section | None:
    tree = _read_with_bases(path, (), problems)
    if tree is None:
        return None
    written: set[str] = set()
    for override in overrides:
        tree = _override(tree, override, written, problems)
    return tree


def _read_with_bases(path: Path, inside: tuple[Path, ...], problems: list[Problem]) -> Section | None:
    wrong = path_problem("configuration file", str(path))
    if wrong:
        problems.append(Problem("", wrong))
        return None
    tree = read_file(path, problems)
    if tree is None or BASE not in tree.entries:
        return tree
    own = Section({name: entry for name, entry in tree.entries.items() if name != BASE}, tree.place)
    entry = tree.entries[BASE]
    chain = (*inside, path.resolve())
    merged: Section | None = None
    num_problems = len(problems)
    for name in _base_names(entry, problems):
        base_path = Path(os.path.normpath(path.parent / name))
        if base_path.resolve() in chain:
            problems.append(Problem(BASE, f"base: {base_path} is a base of itself", (), entry.place))
            continue
        base = _read_with_bases(base_path, chain, problems)
        if base is not None:
            merged = base if merged is None else _merge(merged, base)
    # Without a base, everything it holds would be reported as missing; the cause alone is told.
    if any(problem.key in ("", BASE) for problem in problems[num_problems:]):
        return None
    return own if merged is None else _merge(merged, own)


def _base_names(entry: Entry, problems: list[Problem]) -> list[str]:
    items = entry.node.items if isinstance(entry.node, Listing) else (entry.node,)
    names: list[str] = []
    for item in items:
        if isinstance(item, Scalar) and isinstance(item.value, str):
            names.append(item.value)
        else:
            problems.append(Problem(BASE, f"base is {kind_of(item)}, needs a file or a list of files", (), entry.place))
    return names


def _merge(under: Section, over: Section) -> Section:
    entries = dict(under.entries)
    for name, entry in over.entries.items():
        below = entries.get(name)
        if below is not None and isinstance(below.node, Section) and isinstance(entry.node, Section):
            entries[name] = Entry(_merge(below.node, entry.node), entry.place)
        else:
            entries[name] = entry
    return Section(entries, under.place if over.place == OVERRIDE else over.place)


def _override(tree: Section, override: str, written: set[str], problems: list[Problem]) -> Section:
    key, sign, text = override.partition("=")
    names = key.split(".")
    if not sign or not all(names):
        problems.append(Problem("", f"override {shown(override)}: needs the form section.key=value"))
        return tree
    if key in written:
        problems.append(Problem(key, f"override {key} given twice"))
    written.add(key)
    node: Node | None = Scalar(None, "", OVERRIDE)
    if text.strip():
        node = read_text(text, f"{OVERRIDE} {key}", problems, key)
    if node is None:
        return tree
    for name in reversed(names):
        node = Section({name: Entry(node, OVERRIDE)}, OVERRIDE)
    assert isinstance(node, Section), "an override has at least one name"
    return _merge(tree, node)
