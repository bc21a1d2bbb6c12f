"""Save a checkpoint over all ranks, or leave everything as it was and say so on all of them.

The story of a save, each line a point at which the machine may die:
  1. rank 0 clears what a crash left behind and makes step-N.gG.tmp (G: the run's generation);
  2. every rank writes and syncs its own file there;
  3. rank 0 checks over all reports that every tensor is covered exactly once, and writes COMMIT.json;
  4. rank 0 renames that folder to step-N: before this line the old checkpoint counts, after it the new one;
  5. only now, with that name synced, older ones are pruned, after one of those that stay was read back and verified.
     `latest` is for people and scripts; no load reads it.
A failure on one rank is told to all between these lines, so all raise the same CheckpointError together.

A run that went back to an earlier step saves steps that exist already. This one and those of its abandoned future are
set aside as step-M.aside before line 4, or a later start would take them for the newest; they go once they are replaced
or older than all that are kept. A load uses one only if it is asked for that step or if there is nothing else.

Rank 0 asks the fence before each change in lines 1, 4 and 5 that a load could see (fence.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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
from megagrok.checkpoint.disk import Disk, Space
from megagrok.checkpoint.fence import Fence, Unfenced
from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.readback import damaged_before
from megagrok.checkpoint.retention import (
    clear_unfinished,
    is_complete,
    prune,
    set_aside_from,
    unfinished_hint,
    unfinished_name,
)
from megagrok.checkpoint.shard import disk_failure, write_shard
from megagrok.checkpoint.together import together
from megagrok.checkpoint.verify import size_problems
from megagrok.errors import CheckpointError, ConfigError
from megagrok.parallel.ranks import JSON, Ranks


@dataclass(frozen=True, slots=True)
class Save:
    """One save, as all its parts need it."""

    disk: Disk
    root: Path
    step: int
    facts: Mapping[str, JSON]
    ranks: Ranks
    keep: int
    fence: Fence

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.root / unfinished_name(self.step, self.fence.generation)

    @property
    def target(self) -> Path:
        """Where it counts."""
        return self.root / step_name(self.step)

    @property
    def shard(self) -> Path:
        """This rank's file."""
        return self.folder / f"rank-{self.ranks.rank:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is in place."""

    path: Path
    bytes: int
    """Of all tensors, over all ranks."""


class NotPruned(CheckpointError):
    """The checkpoint is in place; syncing its name or pruning older ones failed."""


def save_checkpoint(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    facts: Mapping[str, JSON],
    *,
    ranks: Ranks,
    keep: int,
    fence: Fence | None = None,
) -> Path:
    """Write step `step` under `root` and return its folder. Collective: every rank calls it, with its own fragments.

    root: a directory that all ranks see.  fragments: over all ranks they cover each tensor exactly once.
    facts: what else resuming needs (config, data position, layout, versions), JSON, the same on all ranks; needs
    "run_id", a string.  keep: complete checkpoints to keep, at least 2, this one included.
    fence: what says whether this start of the run still holds `root`; rank 0 asks. None where nobody else can.
    Raises CheckpointError, the same on all ranks: nothing is committed then and older checkpoints are as they were,
    except where the text says that the step is in place. Raises ConfigError for keep < 2.
    """
    save = Save(Disk(), root, step, facts, ranks, keep, fence or Unfenced())
    return save_through(save, fragments).path


def take_over(root: Path, fence: Fence) -> None:
    """Clear what earlier starts of the run left unfinished under `root`; what of them still lives can commit nothing.

    One process of a new start calls it, before anything is loaded. Raises CheckpointError.
    """
    try:
        if root.exists():
            clear_unfinished(Disk(), root, fence)
    except OSError as error:
        raise disk_failure(root, error) from error


def save_through(save: Save, fragments: Iterable[Fragment], *, are_private: bool = False) -> Saved:
    """`save_checkpoint` with the file system given, so that tests can stop it anywhere.

    are_private: nobody else writes to the fragments' memory, which is the host's: it is hashed and written as it lies.
    """
    if save.keep < 2:
        raise ConfigError(f"checkpoint.keep = {save.keep}, needs at least 2: a bad newest checkpoint would end the run")
    ranks, failed = save.ranks, f"checkpoint step {save.step} was not saved in {save.root}"
    mine: list[Fragment] = []
    try:
        started = together(ranks, failed, lambda: _begin(save, fragments, mine))
        if problem := _first_difference(started) or _lack_of_space(save.root, started):
            raise CheckpointError(f"{failed}: {problem}")
        reports = together(ranks, failed, lambda: write_shard(save.disk, save.shard, mine, _marks(save), are_private))
        together(ranks, failed, lambda: commit_shards(save, reports))
    except CheckpointError:
        discard(save)
        raise
    in_place = (
        f"checkpoint step {save.step} is in place in {save.root}, but syncing its name and pruning older ones failed"
    )
    try:
        damaged = damaged_before(save.root, save.step, save.keep, ranks, in_place)
        together(ranks, in_place, lambda: _tidy(save, damaged))
    except CheckpointError as error:
        raise NotPruned(str(error)) from error
    return Saved(save.target, sum(_whole(report, "bytes") for report in started))


def _marks(save: Save) -> dict[str, str]:
    """What the header of a shard says for a person who finds it alone."""
    ranks, generation, run_id = save.ranks, save.fence.generation, save.facts["run_id"]
    marks = {"step": save.step, "rank": ranks.rank, "world_size": ranks.world_size, "run_id": run_id}
    return {key: str(value) for key, value in (marks | {"generation": generation}).items()}


def _begin(save: Save, fragments: Iterable[Fragment], mine: list[Fragment]) -> JSON:
    """Line 1; `mine` gets the fragments. Returns what all ranks must agree on and, from rank 0, what space there is."""
    facts = save.facts
    if not isinstance(facts.get("run_id"), str):
        raise CheckpointError(f'facts["run_id"] = {facts.get("run_id")!r}, needs a string that names the run')
    try:
        digests: JSON = {key: digest_of(canonical_json(value)) for key, value in facts.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the facts are not JSON: {error}") from error
    mine += fragments
    report: dict[str, JSON] = {"step": save.step, "facts": digests, "bytes": sum(part.num_bytes for part in mine)}
    if save.ranks.rank == 0:
        try:
            save.disk.make_directory(save.root)
            clear_unfinished(save.disk, save.root, save.fence)
            space = save.disk.free_space(save.root)
            save.disk.make_directory(save.folder)
            save.disk.sync_directory(save.root)
        except OSError as error:
            raise disk_failure(save.folder, error) from error
        report |= {"free_bytes": space.bytes, "free_files": space.files}
    return report


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


def _lack_of_space(root: Path, reports: list[JSON]) -> str | None:
    """Found before a byte is written: the ranks of a large run would fill what others need before they met the end."""
    space = Space(_whole(reports[0], "free_bytes"), _whole(reports[0], "free_files"))
    return space.lack(root, sum(_whole(report, "bytes") for report in reports), len(reports) + 2)


def _whole(report: JSON, key: str) -> int:
    assert isinstance(report, dict)
    value = report[key]
    assert isinstance(value, int)
    return value


def commit_shards(save: Save, reports: list[JSON]) -> None:
    """Lines 3 and 4, on rank 0. reports: what `write_shard` returned for each file. Raises CheckpointError."""
    if save.ranks.rank != 0:
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
            {"format": FORMAT, "step": save.step, "facts": dict(save.facts), "tensors": tensors, "files": files}
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if problems := size_problems(save.folder, commit):
        raise CheckpointError(f"{'; '.join(problems[:3])}. Every rank must write to a directory that rank 0 sees")
    page = commit.to_bytes()
    if len(page) > MAX_COMMIT_BYTES:
        raise CheckpointError(f"{COMMIT_NAME} would have {len(page)} bytes, a load accepts {MAX_COMMIT_BYTES}")
    try:
        save.disk.write_file(save.folder / COMMIT_NAME, page)
        set_aside_from(save.disk, save.root, save.step, save.fence)
        save.fence.check()
        save.disk.rename(save.folder, save.target)
    except OSError as error:
        raise disk_failure(save.folder / COMMIT_NAME, error, len(page)) from error


def _tidy(save: Save, damaged: set[Path]) -> None:
    """Line 5."""
    if save.ranks.rank != 0:
        return
    try:
        # This syncs the names in root, the new step's too: nothing is pruned before it is there to stay.
        hint, beside = save.root / "latest", save.root / unfinished_hint(save.fence.generation)
        save.disk.write_file(hint, (step_name(save.step) + "\n").encode(), beside=beside, check=save.fence.check)
        counts = partial(_counts, damaged)
        prune(save.disk, save.root, save.keep, save.fence, counts)
    except OSError as error:
        raise disk_failure(save.root / "latest", error) from error


def _counts(damaged: set[Path], folder: Path) -> bool:
    return folder not in damaged and is_complete(folder)


def discard(save: Save) -> None:
    """Remove an unfinished save, on all ranks together.

    The next one clears what cannot be removed now; the first error matters more.
    """
    try:
        save.disk.remove(save.shard)
    except OSError:
        pass
    save.ranks.barrier()
    if save.ranks.rank == 0 and save.folder.exists():
        try:
            save.disk.remove_tree(save.folder)
        except OSError:
            pass
    save.ranks.barrier()
