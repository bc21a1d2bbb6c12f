"""Save a checkpoint over all ranks, or leave everything as it was and say so on all of them.

The story of a save, each line a point at which the machine may die:
  1. rank 0 clears what a crash left behind and makes step-N.tmp;
  2. every rank writes and syncs its own file there;
  3. rank 0 checks over all reports that every tensor is covered exactly once, and writes COMMIT.json;
  4. rank 0 renames step-N.tmp to step-N: before this line the old checkpoint counts, after it the new one;
  5. only now, with that name synced, older ones are pruned. `latest` is for people and scripts; no load reads it.
A failure on one rank is told to all between these lines, so all raise the same CheckpointError together.

A run that went back to an earlier step saves steps that exist already. This one and those of its abandoned future are
set aside as step-M.aside before line 4, or a later start would take them for the newest; they go once they are replaced
or older than all that are kept. A load uses one only if it is asked for that step or if there is nothing else.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megagrok.checkpoint.commit import (
    COMMIT_NAME,
    FORMAT,
    MAX_COMMIT_BYTES,
    canonical_json,
    commit_from_json,
    digest_of,
    step_name,
)
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.retention import UNFINISHED, clear_unfinished, prune, set_aside_from
from megagrok.checkpoint.shard import disk_failure, write_shard
from megagrok.checkpoint.verify import size_problems
from megagrok.errors import CheckpointError, ConfigError
from megagrok.parallel.ranks import JSON, Ranks


def save_checkpoint(
    root: Path, step: int, fragments: Iterable[Fragment], facts: Mapping[str, JSON], *, ranks: Ranks, keep: int
) -> Path:
    """Write step `step` under `root` and return its folder. Collective: every rank calls it, with its own fragments.

    root: a directory that all ranks see.  fragments: over all ranks they cover each tensor exactly once.
    facts: what else resuming needs (config, data position, layout, versions), JSON, the same on all ranks; needs
    "run_id", a string.  keep: complete checkpoints to keep, at least 2, this one included.
    Raises CheckpointError, the same on all ranks: nothing is committed then and older checkpoints are as they were,
    except where the text says that the step is in place. Raises ConfigError for keep < 2.
    """
    return save_through(Disk(), root, step, fragments, facts, ranks=ranks, keep=keep)


def save_through(
    disk: Disk,
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    facts: Mapping[str, JSON],
    *,
    ranks: Ranks,
    keep: int,
) -> Path:
    """`save_checkpoint` with the file system given, so that tests can stop it anywhere."""
    if keep < 2:
        raise ConfigError(f"checkpoint.keep = {keep}, needs at least 2: a bad newest checkpoint would end the run")
    target, folder = root / step_name(step), root / (step_name(step) + UNFINISHED)
    failed = f"checkpoint step {step} was not saved in {root}"
    try:
        started = _together(ranks, failed, lambda: _begin(disk, folder, step, facts, ranks))
        if difference := _first_difference(started):
            raise CheckpointError(f"{failed}: {difference}")
        shard = folder / f"rank-{ranks.rank:05d}.safetensors"
        marks = {"step": step, "rank": ranks.rank, "world_size": ranks.world_size, "run_id": facts["run_id"]}
        text = {key: str(value) for key, value in marks.items()}
        reports = _together(ranks, failed, lambda: write_shard(disk, shard, fragments, text))
        _together(ranks, failed, lambda: _commit(disk, folder, target, step, facts, reports, ranks))
    except CheckpointError:
        _discard(disk, folder, ranks)
        raise
    in_place = f"checkpoint step {step} is in place in {root}, but syncing its name and pruning older ones failed"
    _together(ranks, in_place, lambda: _tidy(disk, root, step, keep, ranks))
    return target


def _together(ranks: Ranks, failed: str, work: Callable[[], JSON]) -> list[JSON]:
    """Do `work` on this rank and return what all ranks' work returned, or raise on all what failed on any."""
    cause: Exception | None = None
    report: dict[str, JSON] = {"value": None, "problem": None}
    try:
        report["value"] = work()
    except Exception as error:  # not to go on: it is raised below, on the other ranks too, instead of a hang there
        cause = error
        report["problem"] = str(error) if isinstance(error, CheckpointError) else repr(error)
    values: list[JSON] = []
    problems = []
    for rank, other in enumerate(ranks.gather(report)):
        assert isinstance(other, dict)
        values.append(other["value"])
        if other["problem"] is not None:
            problems.append(f"rank {rank}: {other['problem']}")
    if problems:
        more = f"; and {len(problems) - 3} more ranks" if problems[3:] else ""
        raise CheckpointError(f"{failed}: {'; '.join(problems[:3])}{more}") from cause
    return values


def _begin(disk: Disk, folder: Path, step: int, facts: Mapping[str, JSON], ranks: Ranks) -> JSON:
    """Line 1. Returns what all ranks must agree on: {"step": .., "facts": {key: digest}}."""
    if not isinstance(facts.get("run_id"), str):
        raise CheckpointError(f'facts["run_id"] = {facts.get("run_id")!r}, needs a string that names the run')
    try:
        digests: JSON = {key: digest_of(canonical_json(value)) for key, value in facts.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the facts are not JSON: {error}") from error
    if ranks.rank == 0:
        try:
            disk.make_directory(folder.parent)
            clear_unfinished(disk, folder.parent)
            disk.make_directory(folder)
            disk.sync_directory(folder.parent)
        except OSError as error:
            raise disk_failure(folder, error) from error
    return {"step": step, "facts": digests}


def _first_difference(reports: list[JSON]) -> str | None:
    first = reports[0]
    for rank, other in enumerate(reports):
        assert isinstance(first, dict) and isinstance(other, dict)
        if other["step"] != first["step"]:
            return f"rank 0 saves step {first['step']}, rank {rank} step {other['step']}"
        ours, theirs = first["facts"], other["facts"]
        assert isinstance(ours, dict) and isinstance(theirs, dict)
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if keys:
            return f"the facts of ranks 0 and {rank} differ in {', '.join(keys)}"
    return None


def _commit(
    disk: Disk, folder: Path, target: Path, step: int, facts: Mapping[str, JSON], reports: list[JSON], ranks: Ranks
) -> None:
    """Lines 3 and 4."""
    if ranks.rank != 0:
        return
    tensors: dict[str, JSON] = {}
    files: list[JSON] = []
    for rank, report in enumerate(reports):
        assert isinstance(report, dict) and isinstance(report["tensors"], dict)
        files.append(report["file"])
        for name, info in report["tensors"].items():
            if tensors.setdefault(name, info) != info:
                raise CheckpointError(f"tensor {name} is {tensors[name]} elsewhere and {info} on rank {rank}")
    try:
        commit = commit_from_json(
            {"format": FORMAT, "step": step, "facts": dict(facts), "tensors": tensors, "files": files}
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if problems := size_problems(folder, commit):
        raise CheckpointError(f"{'; '.join(problems[:3])}. Every rank must write to a directory that rank 0 sees")
    page = commit.to_bytes()
    if len(page) > MAX_COMMIT_BYTES:
        raise CheckpointError(f"{COMMIT_NAME} would have {len(page)} bytes, a load accepts {MAX_COMMIT_BYTES}")
    try:
        disk.write_file(folder / COMMIT_NAME, page)
        set_aside_from(disk, target.parent, step)
        disk.rename(folder, target)
    except OSError as error:
        raise disk_failure(folder / COMMIT_NAME, error, len(page)) from error


def _tidy(disk: Disk, root: Path, step: int, keep: int, ranks: Ranks) -> None:
    """Line 5."""
    if ranks.rank != 0:
        return
    try:
        # This syncs the names in root, the new step's too: nothing is pruned before it is there to stay.
        disk.write_file(root / "latest", (step_name(step) + "\n").encode())
        prune(disk, root, keep)
    except OSError as error:
        raise disk_failure(root / "latest", error) from error


def _discard(disk: Disk, folder: Path, ranks: Ranks) -> None:
    """Remove an unfinished save. The next one clears what cannot be removed now; the first error matters more."""
    try:
        disk.remove(folder / f"rank-{ranks.rank:05d}.safetensors")
    except OSError:
        pass
    ranks.barrier()
    if ranks.rank == 0 and folder.exists():
        try:
            disk.remove_tree(folder)
        except OSError:
            pass
    ranks.barrier()
