"""What lies in a folder of checkpoints, for people: a table, one checkpoint's contents, all that is wrong. Reads only.

Nothing here needs the model, its layout or a GPU: COMMIT.json says it all.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megagrok.checkpoint.commit import COMMIT_NAME, Commit, read_commit, step_name
from megagrok.checkpoint.foreign import foreign_file
from megagrok.checkpoint.fragment import DTYPES
from megagrok.checkpoint.retention import ASIDE, steps_under
from megagrok.checkpoint.verify import size_problems, verify_checkpoint
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON

_WIDEST_VALUE = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint as `list_checkpoints` finds it."""

    path: Path
    commit: Commit | None
    """None if it cannot be read."""
    problem: str | None
    """The first thing that is wrong, digests of shards left aside; None if it looks sound."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its shards, as committed."""
        return 0 if self.commit is None else sum(file.size_bytes for file in self.commit.files)


def checkpoints_of(folder: Path) -> Path:
    """The folder of checkpoints that is meant: `folder` itself, or what a run's folder has. Raises CheckpointError."""
    below = folder / "checkpoints"
    for root in (below, folder):
        if root.is_dir() and (steps_under(root) or steps_under(root, ASIDE)):
            return root
    foreign = foreign_file(below) or foreign_file(folder)
    if foreign is not None:
        raise CheckpointError(f"{foreign} is a checkpoint of another program: pickle checkpoints are not loaded")
    raise CheckpointError(f"{folder} has no checkpoints: name the folder of a run, or the folder where its step-* lie")


def list_checkpoints(root: Path) -> list[Listed]:
    """All of them, newest first, what was set aside after its like. Reads pages and sizes, no shard."""
    names = [step_name(step) + suffix for suffix in ("", ASIDE) for step in steps_under(root, suffix)]
    found = []
    for name in sorted(names, reverse=True):
        path = root / name
        try:
            commit, _ = read_commit(path)
        except CheckpointError as error:
            found.append(Listed(path, None, str(error)))
            continue
        found.append(Listed(path, commit, next(iter(size_problems(path, commit)), None)))
    return found


def folder_of(root: Path, step: int | None) -> Path:
    """The folder of a step, or of the newest. Raises CheckpointError if there is none."""
    steps = steps_under(root)
    wanted = steps[0] if step is None and steps else step
    if wanted in steps:
        return root / step_name(wanted)
    if wanted is not None and wanted in steps_under(root, ASIDE):
        return root / (step_name(wanted) + ASIDE)
    raise CheckpointError(f"{root} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps)) or 'none'}")


def verify_steps(root: Path, step: int | None) -> Iterator[tuple[Path, list[str]]]:
    """Each checkpoint (or that of `step`), newest first, with everything that is wrong with it. Reads every byte."""
    folders = [listed.path for listed in list_checkpoints(root)] if step is None else [folder_of(root, step)]
    for folder in folders:
        yield folder, verify_checkpoint(folder)


def table(checkpoints: Iterable[Listed]) -> str:
    """One line a checkpoint."""
    rows = [("step", "size", "files", "saved", "run", "start", "state")]
    for listed in checkpoints:
        facts = {} if listed.commit is None else listed.commit.facts
        rows.append(
            (
                listed.path.name.removeprefix("step-").lstrip("0") or "0",
                "-" if listed.commit is None else size_text(listed.num_bytes),
                "-" if listed.commit is None else str(len(listed.commit.files)),
                _when(listed.path),
                _short(facts.get("run_id", "-"))[:8],
                _short(facts.get("generation", "-"))[:8],
                listed.problem or "sound (digests not read)",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows
    )


def page(folder: Path) -> str:
    """What one checkpoint holds. Raises CheckpointError if its COMMIT.json is not sound."""
    commit, digest = read_commit(folder)
    size = sum(file.size_bytes for file in commit.files)
    facts: dict[str, str] = {
        "step": str(commit.step),
        "saved": _when(folder),
        "size": f"{size_text(size)} in {len(commit.files)} files",
        "commit": digest,
    }
    facts |= {_short(key): _short(value) for key, value in commit.facts.items() if key not in ("config", "data")}
    config, data = commit.facts.get("config"), commit.facts.get("data")
    if isinstance(config, Mapping):
        facts["layout"] = _inline(config.get("parallel"))
    lines = [str(folder), *(f"  {key:<11} {value}" for key, value in facts.items())]
    if isinstance(data, Mapping):
        lines += ["  data", *(f"    {_short(key)}: {_short(value)}" for key, value in sorted(data.items()))]
    lines += ["  tensors", *(f"    {line}" for line in _tensors(commit))]
    return "\n".join(lines)


def _tensors(commit: Commit) -> list[str]:
    """Kinds of tensors (the part of the name before the first slash), then each by name."""
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, info in commit.tensors.items():
        kinds[name.split("/")[0] if "/" in name else "-", info.dtype].append(prod(info.shape))
    lines = [
        f"{kind}: {len(counts)} of {dtype}, {sum(counts):,} elements, {size_text(sum(counts) * DTYPES[dtype].itemsize)}"
        for (kind, dtype), counts in sorted(kinds.items())
    ]
    width = max(map(len, commit.tensors), default=0)
    return lines + [
        f"{name:<{width}}  {info.dtype:>4} {list(info.shape)}" for name, info in sorted(commit.tensors.items())
    ]


def size_text(count: int) -> str:
    """Bytes as a person says them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _when(folder: Path) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / COMMIT_NAME).lstat().st_mtime))
    except OSError:
        return "-"


def _inline(value: JSON) -> str:
    if not isinstance(value, Mapping):
        return _short(value)
    return ", ".join(f"{_short(key)} {_short(item)}" for key, item in value.items())


def _short(value: JSON) -> str:
    # ascii(): a fact may hold anything, a terminal's control sequences too.
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= _WIDEST_VALUE else f"{text[: _WIDEST_VALUE - 3]}..."
