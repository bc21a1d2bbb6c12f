"""The file that trains a layout: the user's file as its base, and the settings that differ from it."""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from megagrok.config import RunConfig, load_config, to_dict
from megagrok.errors import ConfigError

LAYOUT_KEYS = {
    "parallel": ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "data", "zero"),
    "train": ("seq_len", "global_batch", "micro_batch", "precision", "recompute", "evaluate_samples"),
}
"""Always written, also where the base has the same: the file says by itself what the layout is."""


def run_file(base: Path, run: RunConfig, target_folder: Path, comment: str) -> str:
    """The text of a file in `target_folder` that loads as `run`, whose model and data are those of the file `base`."""
    before, after = to_dict(load_config(base).config), to_dict(run)
    settings = _difference(before, after)
    for section, keys in LAYOUT_KEYS.items():
        settings[section] = {key: after[section][key] for key in keys} | settings.get(section, {})
    where = Path(os.path.relpath(base.resolve(), target_folder.resolve())).as_posix()
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump({"base": where, **settings}, sort_keys=False)


def write_run_file(path: Path, base: Path, run: RunConfig, comment: str) -> None:
    """Put it in `path`, which must not exist: what stands there may be somebody's work."""
    text = run_file(base, run, path.parent, comment)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"--write {path}: exists, and is not written over. Fix: another name, or remove it."
        ) from error
    except OSError as error:
        raise ConfigError(f"--write {path}: {error.strerror}") from error


def _difference(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """What `after` has that `before` has not, section by section; lists as a whole."""
    changed: dict[str, dict[str, object]] = {}
    for key, value in after.items():
        old = before[key]
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = _difference(old, value)
            if inner:
                changed[key] = dict(inner)
        elif value != old:
            changed[key] = value  # type: ignore[assignment]
    return changed
