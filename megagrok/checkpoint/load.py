"""Find a checkpoint that every rank can read, and read any rectangular part of any tensor from it.

Not a converter and no policy on what the tensors mean. The one idea: bytes are read once into memory, hashed there, and
those very bytes become the tensor, so a file that changes under a reader is refused, not loaded.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch

from megagrok.checkpoint.commit import Commit, Entry, NewerFormat, ShardFile, digest_of, read_commit, step_name
from megagrok.checkpoint.disk import open_file, read_range
from megagrok.checkpoint.foreign import foreign_file
from megagrok.checkpoint.fragment import DTYPES
from megagrok.checkpoint.geometry import Box, Index, intersect, slices
from megagrok.checkpoint.retention import ASIDE, is_complete, steps_under
from megagrok.checkpoint.verify import digest_problems, size_problems
from megagrok.errors import CheckpointError, ShapeError
from megagrok.parallel.ranks import JSON, Ranks

CACHE_BYTES = 1 << 30


class Checkpoint:
    """A checkpoint whose commit is sound. Reading is local: no rank waits for another."""

    def __init__(self, path: Path, commit: Commit, skipped: tuple[str, ...] = ()) -> None:
        """path: the folder of the step.  skipped: why newer ones were passed over, one line each."""
        self.path = path
        self.skipped = skipped
        self._commit = commit
        self._places: dict[str, list[tuple[ShardFile, Entry]]] = defaultdict(list)
        for file in commit.files:
            for entry in file.entries:
                self._places[entry.name].append((file, entry))
        self._verified: OrderedDict[tuple[str, int], bytearray] = OrderedDict()
        self._verified_bytes = 0

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was saved."""
        return self._commit.step

    @property
    def facts(self) -> Mapping[str, JSON]:
        """What the caller of the save wrote beside the tensors."""
        return self._commit.facts

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._commit.tensors))

    def shape_of(self, name: str) -> Index:
        """Shape of a whole tensor. Raises CheckpointError if there is none of this name."""
        self._check_name(name)
        return self._commit.tensors[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Its dtype. Raises CheckpointError if there is none of this name."""
        self._check_name(name)
        return DTYPES[self._commit.tensors[name].dtype]

    def read(self, name: str, start: Index, shape: Index) -> torch.Tensor:
        """The block of `shape` at `start` of a tensor, on the CPU, in the stored dtype, whatever layout wrote it.

        Raises CheckpointError, naming the file, unless every byte it uses has the committed digest; ShapeError if the
        block does not lie in the tensor.
        """
        whole = self.shape_of(name)
        inside = len(start) == len(shape) == len(whole) and all(
            s >= 0 and n >= 0 and s + n <= g for s, n, g in zip(start, shape, whole, strict=True)
        )
        if not inside:
            raise ShapeError(f"{name}: block at {tuple(start)} of shape {tuple(shape)} does not lie in {whole}")
        wanted = Box(tuple(start), tuple(shape))
        result = torch.empty(wanted.shape, dtype=self.dtype_of(name))
        for file, entry in self._places[name]:
            if intersect(entry.piece.box, wanted):
                self._copy(file, entry, wanted, result)
        return result

    def _copy(self, file: ShardFile, entry: Entry, wanted: Box, result: torch.Tensor) -> None:
        """Put the part of `wanted` that an entry holds in its place in `result`."""
        position = 0
        for box in entry.piece.boxes():
            if shared := intersect(box, wanted):
                values = torch.frombuffer(self._bytes(file, entry), dtype=torch.uint8).view(result.dtype)
                held = values[position : position + box.size].view(box.shape)
                result[slices(shared, wanted.start)] = held[slices(shared, box.start)]
            position += box.size

    def _bytes(self, file: ShardFile, entry: Entry) -> bytearray:
        """The verified bytes of an entry; the last ones read are kept, for many blocks may come from one entry."""
        key = (file.name, entry.offset)
        if key in self._verified:
            self._verified.move_to_end(key)
            return self._verified[key]
        data = self._read_verified(file, entry)
        self._verified[key] = data
        self._verified_bytes += len(data)
        while self._verified_bytes > CACHE_BYTES and len(self._verified) > 1:
            _, old = self._verified.popitem(last=False)
            self._verified_bytes -= len(old)
        return data

    def _read_verified(self, file: ShardFile, entry: Entry) -> bytearray:
        path = self.path / file.name
        descriptor, size = open_file(path)
        with open(descriptor, "rb"):
            if size != file.size_bytes:
                raise CheckpointError(f"{path}: has {size} bytes, {file.size_bytes} were committed")
            data = read_range(path, descriptor, entry.offset, self._commit.entry_bytes(entry))
        found = digest_of(data)
        if found != entry.digest:
            raise CheckpointError(
                f"{path}: the bytes of {entry.name} at {entry.offset} have digest {found}, {entry.digest} was committed"
            )
        return data

    def _check_name(self, name: str) -> None:
        if name not in self._commit.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r} among its {len(self._commit.tensors)}")


def list_steps(root: Path) -> list[int]:
    """Steps under `root` whose COMMIT.json is sound and whose files have their sizes, newest first. Local."""
    return [step for step in steps_under(root) if is_complete(root / step_name(step))]


def require_one_run(root: Path) -> None:
    """Raise CheckpointError if the checkpoints under `root` are of several runs; damaged ones say nothing. Local."""
    steps: dict[str, list[int]] = defaultdict(list)
    for step in steps_under(root):
        try:
            commit, _ = read_commit(root / step_name(step))
        except CheckpointError:
            continue
        steps[str(commit.facts.get("run_id"))].append(step)
    if len(steps) > 1:
        found = "; ".join(f"steps {_list(of_one)} of run {run_id}" for run_id, of_one in steps.items())
        raise CheckpointError(
            f"{root} holds checkpoints of {len(steps)} runs: {found}. Move those of one away, or give the new run "
            "another name (name=...)."
        )


def find_checkpoint(
    root: Path, *, ranks: Ranks, step: int | None = None, verify: Literal["sizes", "digests"] = "digests"
) -> Checkpoint | None:
    """The newest checkpoint that verifies on all ranks, or that of `step`; None only if there is none at all.

    Collective; all ranks return the same step, or raise the same CheckpointError. `skipped` of the result says which
    newer ones were passed over and why. "digests" reads every file once, shared out over the ranks, so that a damaged
    checkpoint is skipped here; "sizes" leaves damage to be refused by `read`.
    Raises CheckpointError if `step` is given and is not there or not sound, and if there are only damaged ones: a run
    that has checkpoints never silently starts from scratch.
    """
    folders = _agree_on_folders(root, ranks)
    if step is not None and step not in folders:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; it has {_list(folders)}")
    # What was set aside is an abandoned future, or all there is if a save died between two renames.
    current = [other for other, name in folders.items() if not name.endswith(ASIDE)]
    skipped: list[str] = []
    for candidate in [step] if step is not None else current or folders:
        folder = root / folders[candidate]
        commit, problem = _examine(folder, ranks, verify)
        if commit is not None and problem is None:
            return Checkpoint(folder, commit, tuple(skipped))
        skipped.append(f"{folder.name}: {problem}")
    if step is not None:
        raise CheckpointError(
            f"{root}: {skipped[0]}. Other steps here: {_list(other for other in folders if other != step)}"
        )
    if skipped:
        raise CheckpointError(f"{root}: none of {len(skipped)} checkpoints is sound: {'; '.join(skipped)}")
    _refuse_foreign(root, ranks)
    return None


def _refuse_foreign(root: Path, ranks: Ranks) -> None:
    """Where there is nothing of ours: a checkpoint of another program must not be taken for a folder that is empty."""
    for rank, path in enumerate(ranks.gather(foreign_file(root))):
        if path is not None:
            raise CheckpointError(
                f"rank {rank}: {path} is a checkpoint of another program: pickle checkpoints are not loaded, for a "
                "pickle runs code when it is read. Move it away, or give the run another name (name=...)."
            )


def _agree_on_folders(root: Path, ranks: Ranks) -> dict[int, str]:
    """Folder names by step, newest first: all that any rank sees, and what was set aside where it was not replaced."""
    report: dict[str, JSON] = {"current": [], "aside": [], "problem": None}
    try:
        report["current"], report["aside"] = steps_under(root), steps_under(root, ASIDE)
    except OSError as error:
        report["problem"] = f"{root}: {error.strerror}"
    folders: dict[int, str] = {}
    views = ranks.gather(report)
    for kind, suffix in (("aside", ASIDE), ("current", "")):
        for rank, view in enumerate(views):
            assert isinstance(view, dict) and isinstance(view[kind], list)
            if view["problem"] is not None:
                raise CheckpointError(f"rank {rank}: {view['problem']}")
            folders |= {int(str(step)): step_name(int(str(step))) + suffix for step in view[kind]}
    return dict(sorted(folders.items(), reverse=True))


def _examine(folder: Path, ranks: Ranks, verify: Literal["sizes", "digests"]) -> tuple[Commit | None, str | None]:
    """This rank's view of the commit, and what any rank found wrong with the checkpoint; collective."""
    commit: Commit | None = None
    digest, is_newer = "", False
    try:
        commit, digest = read_commit(folder)
        problems = size_problems(folder, commit)
        if not problems and verify == "digests":
            problems = digest_problems(folder, commit.files[ranks.rank :: ranks.world_size])
    except CheckpointError as error:
        problems, is_newer = [str(error)], isinstance(error, NewerFormat)
        foreign = foreign_file(folder)
        if foreign is not None:
            problems.append(f"{foreign}: pickle checkpoints are not loaded")
    found: list[str] = []
    digests = set()
    report: JSON = {"problems": list(problems[:3]), "digest": digest, "is_newer": is_newer}
    for rank, other in enumerate(ranks.gather(report)):
        assert isinstance(other, dict) and isinstance(other["problems"], list)
        if other["is_newer"]:
            # Not damage: falling back would throw away what a newer build has done.
            raise CheckpointError(f"rank {rank}: {other['problems'][0]}")
        digests.add(other["digest"])
        found += [f"rank {rank}: {problem}" for problem in other["problems"]]
    if not found and len(digests) > 1:
        found = ["the ranks see different COMMIT.json files; they need one shared file system"]
    if not found:
        return commit, None
    more = f"; and {len(found) - 2} more" if found[2:] else ""
    return commit, "; ".join(found[:2]) + more


def _list(steps: Iterable[int]) -> str:
    shown = list(map(str, steps))
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8)) or "none"
