"""A writer of an earlier start of the run wakes up anywhere in its save: it changes nothing that the new one sees."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrok.checkpoint import Fence, find_checkpoint, list_steps, verify_checkpoint
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.retention import clear_unfinished
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import Alone
from tests.checkpoint.worlds import (
    Stopped,
    StoppingDisk,
    all_ranks,
    find,
    make_layout,
    make_tensors,
    read_all,
    same_tensors,
    save_steps,
    save_world,
)

MANY_POINTS = 400


class Claim:
    """The lease of a run, as a counter that both starts look at."""

    def __init__(self, holder: list[int], generation: int) -> None:
        self.generation, self._holder = generation, holder

    def check(self) -> None:
        if self._holder[0] != self.generation:
            raise CheckpointError(f"start {self._holder[0]} holds the run, this is start {self.generation}")


class SleepingDisk(StoppingDisk):
    """Sleeps after the `at`-th change to the file system; `meanwhile` is what the others do then."""

    def __init__(self, at: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(None)
        self.sleep_at, self._meanwhile, self._slept = at, meanwhile, False

    def _point(self, verb: str, path: Path) -> bool:
        if self.count == self.sleep_at and not self._slept:
            self._slept = True
            self._meanwhile()
        return super()._point(verb, path)


class Woken(Claim):
    """The old start's claim; what it slept through happened before it asks, not between its question and the change."""

    def __init__(self, holder: list[int], disk: SleepingDisk) -> None:
        super().__init__(holder, 1)
        self._disk = disk

    def check(self) -> None:
        if self._disk.count == self._disk.sleep_at and not self._disk._slept:
            self._disk._slept = True
            self._disk._meanwhile()
        super().check()


def seen(root: Path) -> dict[str, bytes]:
    """Everything that a load, a listing or a person can see: all but folders that are being written."""
    files = [path for path in root.rglob("*") if path.is_file() and ".tmp" not in str(path.relative_to(root))]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def take_over(root: Path, claim: Fence) -> None:
    """What a new start does before it loads."""
    root.mkdir(exist_ok=True)
    clear_unfinished(Disk(), root, claim)


# None: the new start has the lease, and has not come to clearing what lies about.
SAVES_MEANWHILE: dict[str, list[int] | None] = {
    "only the lease": None,
    "nothing": [],
    "the same step": [3],
    "a later step": [4],
    "an earlier and the same step": [2, 3],
}


@pytest.mark.parametrize("meanwhile", SAVES_MEANWHILE.values(), ids=SAVES_MEANWHILE.keys())
def test_an_old_writer_that_wakes_up_changes_nothing(tmp_path: Path, meanwhile: list[int] | None) -> None:
    save_steps(tmp_path / "before", [1, 2], world_size=1)
    old, new = make_layout(make_tensors(100), 1, 4), make_layout(make_tensors(200), 1, 5)
    for at in range(MANY_POINTS):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        holder: list[int] = [1]
        after_takeover: list[dict[str, bytes]] = [{}]

        def others_take_over(
            root: Path = root, holder: list[int] = holder, after: list[dict[str, bytes]] = after_takeover
        ) -> None:
            holder[0] = 2
            claim = Claim(holder, 2)
            if meanwhile is not None:
                take_over(root, claim)
            for step in meanwhile or []:
                all_ranks(save_world(root, step, new, fence=claim))
            after[0] = seen(root)

        disk = SleepingDisk(at, others_take_over)
        [outcome] = save_world(root, 3, old, disks=[disk], fence=Woken(holder, disk))
        if holder == [1]:
            assert not isinstance(outcome, BaseException)
            break
        assert seen(root) == after_takeover[0], f"after {disk.log[:at]}, the old writer did {disk.log[at:]}"
        found = find(root)
        assert verify_checkpoint(found.path) == [] and found.step >= 2
        all_ranks(save_world(root, found.step + 1, new, fence=Claim(holder, 2)))
        assert same_tensors(read_all(find(root)), make_tensors(200)) and not list(root.glob("*.tmp"))
    assert 10 < at < MANY_POINTS - 1


def test_a_start_that_went_back_is_not_set_aside_by_the_one_before_it(tmp_path: Path) -> None:
    """The old writer had listed nothing to set aside, or something that is another checkpoint by now."""
    root = tmp_path / "run"
    holder = [2]
    all_ranks(save_world(root, 3, make_layout(make_tensors(1), 1, 1), fence=Claim(holder, 2)))
    before = seen(root)
    [outcome] = save_world(root, 3, make_layout(make_tensors(2), 1, 1), fence=Claim(holder, 1))
    assert isinstance(outcome, CheckpointError) and "start 2 holds the run, this is start 1" in str(outcome)
    assert seen(root) == before and not list(root.glob("*.tmp"))


def test_all_ranks_of_an_old_start_are_told_before_they_write(tmp_path: Path) -> None:
    disks = [StoppingDisk(None) for _ in range(3)]
    layout = make_layout(make_tensors(2), 3, 1)
    outcomes = save_world(tmp_path / "run", 3, layout, disks=list(disks), fence=Claim([2], 1))
    assert len(set(map(str, outcomes))) == 1 and all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert not any(verb in ("create", "write") for disk in disks for verb, _ in disk.log)


def test_two_starts_never_write_in_one_folder_and_only_what_is_older_is_cleared(tmp_path: Path) -> None:
    root = tmp_path / "run"
    layout, holder = make_layout(make_tensors(1), 1, 1), [1]
    save_steps(root, [1], world_size=1)
    for generation in (1, 2, 3):
        holder[0] = generation
        # The death comes with the shard half written.
        [outcome] = save_world(root, 7, layout, disks=[StoppingDisk(6 + generation)], fence=Claim(holder, generation))
        assert isinstance(outcome, Stopped)
        assert [path.name for path in root.glob("*.tmp")] == [f"step-00000007.g{generation}.tmp"]
    holder[0] = 2
    (root / "step-00000009.tmp").mkdir()
    (root / "step-00000009.g2.tmp").mkdir()
    (root / "step-00000009.g02.tmp").mkdir()
    take_over(root, Claim(holder, 2))
    assert sorted(path.name for path in root.glob("*.tmp")) == ["step-00000007.g3.tmp", "step-00000009.g02.tmp"]
    assert list_steps(root) == [1]


def test_what_is_being_written_is_never_found(tmp_path: Path) -> None:
    root = tmp_path / "run"
    save_steps(root, [5], world_size=1)
    (root / "step-00000005").rename(root / "step-00000005.g3.tmp")
    assert list_steps(root) == [] and find_checkpoint(root, ranks=Alone()) is None
