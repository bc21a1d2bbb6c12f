"""A save happens for all ranks or for none, and what stays on the disk is never less than was promised."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megagrok.checkpoint import Fragment, find_checkpoint, list_steps, save_checkpoint, verify_checkpoint
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fence import Unfenced
from megagrok.checkpoint.save import Save, save_through
from megagrok.errors import CheckpointError, ConfigError
from megagrok.parallel.ranks import JSON, Alone, Ranks
from tests.checkpoint.worlds import (
    IO_ERROR,
    NO_SPACE,
    Layout,
    Stopped,
    StoppingDisk,
    all_ranks,
    find,
    make_layout,
    make_tensors,
    read_all,
    run_world,
    same_tensors,
    save_steps,
    save_world,
    small_file_system,
)

# More changes to the file system than any save below makes.
MANY_POINTS = 400


def only_these_steps_and_files(root: Path, steps: set[int]) -> None:
    """The folders of these steps, sound, and nothing unfinished."""
    assert set(list_steps(root)) == steps
    assert all(verify_checkpoint(root / f"step-{step:08d}") == [] for step in steps)
    assert not [path.name for path in root.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(("before", "step"), [([1, 2], 3), ([1, 2, 3], 2), ([1], 1), ([], 1)], ids=str)
@pytest.mark.fault("F3")
def test_a_death_at_any_point_of_a_save_leaves_the_old_or_the_new(tmp_path: Path, before: list[int], step: int) -> None:
    new = make_tensors(100)
    layout = make_layout(new, 1, 4)
    old = save_steps(tmp_path / "before", before)
    (tmp_path / "before").mkdir(exist_ok=True)
    for at in range(1, MANY_POINTS):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        [outcome] = save_world(root, step, layout, disks=[StoppingDisk(at)])
        found = find_checkpoint(root, ranks=Alone())
        assert found is not None or not before
        assert all(verify_checkpoint(folder) == [] for folder in root.glob("step-" + "[0-9]" * 8))
        if found is not None:
            whole = [new] * (found.step == step) + ([old[found.step]] if found.step in old else [])
            assert any(same_tensors(read_all(found), tensors) for tensors in whole)
        all_ranks(save_world(root, step, layout))
        assert same_tensors(read_all(find(root)), new) and find(root).step == step
        only_these_steps_and_files(root, set(list_steps(root)))
        assert len(list_steps(root)) >= min(2, len([s for s in before if s < step]) + 1)
        if not isinstance(outcome, BaseException):
            break
        assert isinstance(outcome, Stopped)
    assert 10 < at < MANY_POINTS - 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_of_one_rank_of_two_leaves_the_old_or_the_new(tmp_path: Path, victim: int) -> None:
    new = make_tensors(100)
    layout = make_layout(new, 2, 4)
    old = save_steps(tmp_path / "before", [1, 2])
    shutil.copytree(tmp_path / "before", tmp_path / "count")
    disks = [StoppingDisk(None), StoppingDisk(None)]
    all_ranks(save_world(tmp_path / "count", 3, layout, disks=list(disks)))
    for at in range(1, disks[victim].count + 1):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        outcomes = save_world(
            root, 3, layout, disks=[StoppingDisk(at if rank == victim else None) for rank in range(2)]
        )
        assert isinstance(outcomes[victim], Stopped) and isinstance(outcomes[1 - victim], BaseException)
        found = find(root)
        assert found.step in (2, 3)
        assert same_tensors(read_all(found), new if found.step == 3 else old[2])
        all_ranks(save_world(root, 3, layout))
        only_these_steps_and_files(root, {2, 3})


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fails_with", [NO_SPACE, IO_ERROR], ids=["no_space", "io_error"])
def test_a_failure_at_any_point_on_any_rank_is_the_same_error_on_all(
    tmp_path: Path, victim: int, fails_with: int
) -> None:
    layout = make_layout(make_tensors(100), 3, 4)
    old = save_steps(tmp_path / "before", [1, 2])
    shutil.copytree(tmp_path / "before", tmp_path / "count")
    disks = [StoppingDisk(None) for _ in range(3)]
    all_ranks(save_world(tmp_path / "count", 3, layout, disks=list(disks)))
    for at in range(1, disks[victim].count + 1):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        faulty: list[Disk] = [StoppingDisk(at if rank == victim else None, fails_with) for rank in range(3)]
        outcomes = save_world(root, 3, layout, disks=faulty)
        texts = {str(outcome) for outcome in outcomes}
        assert all(isinstance(outcome, CheckpointError) for outcome in outcomes) and len(texts) == 1
        assert f"rank {victim}: " in texts.pop()
        assert not [path for path in root.glob("step-*.tmp")] or "is in place" in str(outcomes[0])
        found = find(root)
        assert found.step == 3 or same_tensors(read_all(found), old[2])
        assert (found.step == 3) == ("is in place" in str(outcomes[0]))


def test_a_full_disk_is_an_error_on_all_ranks_and_costs_no_checkpoint(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "2m") as mounted:
        if not mounted:
            pytest.skip("needs root and mount(8) for a tmpfs of 2 MiB")
        root = tmp_path / "small" / "run"
        old = save_steps(root, [1, 2])
        big = {"x": torch.randn(1 << 18), "y": torch.randn(1 << 18)}
        for _ in range(2):
            outcomes = save_world(root, 3, make_layout(big, 2, 1))
            assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
            assert len(set(map(str, outcomes))) == 1
            assert re.search(r"No space left on .*small/run: needs 2\.1 MB, has [12]\.\d MB", str(outcomes[0]))
            only_these_steps_and_files(root, {1, 2})
            assert same_tensors(read_all(find(root)), old[2])
        all_ranks(save_world(root, 3, make_layout(old[1], 2, 1)))


class LossyDisk(Disk):
    """Says that all is well and loses the end of each shard."""

    def sync_directory(self, path: Path) -> None:
        for shard in path.glob("*.safetensors"):
            os.truncate(shard, shard.stat().st_size - 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_shard_that_rank_0_does_not_see_whole_is_not_committed(tmp_path: Path, victim: int) -> None:
    save_steps(tmp_path, [1])
    disks = [LossyDisk() if rank == victim else Disk() for rank in range(2)]
    outcomes = save_world(tmp_path, 2, make_layout(make_tensors(2), 2, 1), disks=disks)
    assert all(isinstance(outcome, CheckpointError) and "were committed" in str(outcome) for outcome in outcomes)
    only_these_steps_and_files(tmp_path, {1})


def test_nothing_gets_its_final_name_before_its_bytes_and_names_are_on_the_medium(tmp_path: Path) -> None:
    disk = StoppingDisk(None)
    all_ranks(save_world(tmp_path, 1, make_layout(make_tensors(1), 1, 1), disks=[disk]))
    shard, folder = "rank-00000.safetensors", "step-00000001"
    order = [
        ("sync", shard),
        ("sync_directory", folder + ".tmp"),
        ("sync", "COMMIT.json.tmp"),
        ("rename", "COMMIT.json"),
        ("sync_directory", folder + ".tmp"),
        ("rename", folder),
        ("sync_directory", tmp_path.name),
    ]
    log = iter(disk.log)
    assert all(step in log for step in order), disk.log
    last_write = max(i for i, (verb, name) in enumerate(disk.log) if (verb, name) == ("write", shard))
    assert last_write < disk.log.index(("sync", shard))

    all_ranks(save_world(tmp_path, 2, make_layout(make_tensors(2), 1, 1)))
    disk = StoppingDisk(None)
    all_ranks(save_world(tmp_path, 3, make_layout(make_tensors(3), 1, 1), disks=[disk]))
    log = iter(disk.log)
    durable = [("rename", "step-00000003"), ("sync_directory", tmp_path.name), ("rename", "step-00000001.tmp")]
    assert all(step in log for step in durable), disk.log


def broken(layout: Layout, how: str) -> Layout:
    """The layout with one thing wrong that no rank can see alone."""
    ranks = [list(fragments) for fragments in layout]
    rng = random.Random(how)
    names = [fragment.name for fragments in ranks for fragment in fragments if fragment.data.numel()]
    # A tensor that nobody mentions is not part of a checkpoint, so the one to break is held in several parts.
    shared = next(name for name in names if names.count(name) > 1)
    giver, index = next((f, i) for f in ranks for i, part in enumerate(f) if part.name == shared and part.data.numel())
    chosen = giver[index]
    if how == "missing":
        giver.pop(index)
    elif how == "twice":
        ranks[-1 if ranks[-1] is not giver else 0].append(chosen)
    elif how == "short":
        piece = (chosen.name, chosen.global_shape, chosen.start, chosen.shape, chosen.begin, chosen.end - 1)
        giver[index] = Fragment(*piece, chosen.data[:-1])
    else:
        other = torch.int32 if chosen.data.dtype != torch.int32 else torch.int8
        piece = (chosen.name, chosen.global_shape, chosen.start, chosen.shape, chosen.begin, chosen.end)
        giver[index] = Fragment(*piece, torch.zeros(chosen.data.numel(), dtype=other))
    rng.shuffle(ranks)
    return ranks


@pytest.mark.parametrize(
    ("how", "text"),
    [("missing", "missing|no rank"), ("twice", "twice"), ("short", "missing|no rank"), ("dtype", " is ")],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_tensor_that_is_not_covered_exactly_once_is_not_committed(
    tmp_path: Path, how: str, text: str, seed: int
) -> None:
    save_steps(tmp_path, [1])
    outcomes = save_world(tmp_path, 2, broken(make_layout(make_tensors(2), 2, seed), how))
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes) and len(set(map(str, outcomes))) == 1
    with pytest.raises(CheckpointError, match=text):
        all_ranks(outcomes)
    only_these_steps_and_files(tmp_path, {1})


def save_with_facts(
    root: Path, step_of: Callable[[int], int], facts_of: Callable[[int], dict[str, JSON]]
) -> list[object]:
    layout = make_layout(make_tensors(1), 2, 1)

    def work(ranks: Ranks) -> Path:
        rank = ranks.rank
        return save_through(Save(Disk(), root, step_of(rank), facts_of(rank), ranks, 2, Unfenced()), layout[rank]).path

    return list(run_world(2, work))


@pytest.mark.parametrize(
    ("step_of", "facts_of", "text"),
    [
        (lambda rank: 5 + rank, lambda rank: {"run_id": "a"}, "rank 0 saves step 5, rank 1 step 6"),
        (lambda rank: 5, lambda rank: {"run_id": "a", "consumed": rank}, "facts of ranks 0 and 1 differ in consumed"),
        (lambda rank: 5, lambda rank: {"run_id": "a"} | {"x": 1} if rank else {"run_id": "a"}, "differ in x"),
        (lambda rank: 5, lambda rank: {}, "run_id"),
        (lambda rank: 5, lambda rank: {"run_id": "a", "loss": float("nan")}, "not JSON"),
    ],
)
def test_ranks_that_disagree_save_nothing(
    tmp_path: Path, step_of: Callable[[int], int], facts_of: Callable[[int], dict[str, JSON]], text: str
) -> None:
    outcomes = save_with_facts(tmp_path, step_of, facts_of)
    assert all(isinstance(outcome, CheckpointError) and text in str(outcome) for outcome in outcomes)
    only_these_steps_and_files(tmp_path, set())


def test_an_error_while_fragments_are_made_reaches_all_ranks(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path:
        fragments = (Fragment("x", (2,), (0,), (2,), 0, 2 - ranks.rank, torch.zeros(2)) for _ in range(1))
        return save_checkpoint(tmp_path, 1, fragments, {"run_id": "a"}, ranks=ranks, keep=2)

    outcomes = run_world(2, work)
    assert all(isinstance(outcome, CheckpointError) and "rank 1: ShapeError" in str(outcome) for outcome in outcomes)
    only_these_steps_and_files(tmp_path, set())


def test_a_rank_without_fragments_takes_part(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    all_ranks(save_world(tmp_path, 1, [[], *make_layout(tensors, 1, 1), []]))
    assert same_tensors(read_all(find(tmp_path)), tensors)
    assert verify_checkpoint(tmp_path / "step-00000001") == []


@pytest.mark.parametrize("keep", [2, 3])
def test_as_many_complete_checkpoints_stay_as_were_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 7):
        save_steps(tmp_path, [step], world_size=1, keep=keep)
        only_these_steps_and_files(tmp_path, set(range(max(1, step - keep + 1), step + 1)))


def test_an_incomplete_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    (tmp_path / "step-00000003" / "rank-00001.safetensors").unlink()
    save_steps(tmp_path, [4], keep=2)
    assert list_steps(tmp_path) == [4, 2]
    save_steps(tmp_path, [5, 6], keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rotten", [[4], [3, 4], [2, 3, 4]])
def test_two_that_verify_stay_whatever_has_rotted(tmp_path: Path, rotten: list[int], world_size: int) -> None:
    saved = save_steps(tmp_path, [1, 2, 3, 4], world_size=3)
    for step in rotten:
        path = tmp_path / f"step-{step:08d}" / "rank-00002.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    saved |= save_steps(tmp_path, [5], world_size=world_size, keep=2)
    sound = [step for step in list_steps(tmp_path) if verify_checkpoint(tmp_path / f"step-{step:08d}") == []]
    assert sound == [5, max({1, 2, 3, 4} - set(rotten))]
    assert all(same_tensors(read_all(find(tmp_path, step=step)), saved[step]) for step in sound)
    # What has rotted stays as evidence until it is older than all that are kept.
    assert list_steps(tmp_path) == [5, 4, 3, 2, 1][: len(rotten) + 2]


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_fewer_than_two_kept_checkpoints_are_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=rf"keep = {keep}, needs at least 2"):
        all_ranks(save_world(tmp_path, 1, make_layout(make_tensors(1), 1, 1), keep=keep))


def test_a_run_that_went_back_is_not_resumed_from_its_abandoned_future(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3, 4])
    new = save_steps(tmp_path, [2], keep=2)
    assert find(tmp_path).step == 2 and same_tensors(read_all(find(tmp_path)), new[2])
    assert sorted(path.name for path in tmp_path.glob("*.aside")) == ["step-00000003.aside", "step-00000004.aside"]
    save_steps(tmp_path, [3, 4], keep=2)
    assert not list(tmp_path.glob("*.aside")) and list_steps(tmp_path) == [4, 3]


def test_the_caller_may_change_tensors_as_soon_as_the_save_returns(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    layout = make_layout(tensors, 2, 1)
    all_ranks(save_world(tmp_path, 1, layout))
    for fragment in layout[0] + layout[1]:
        fragment.data.zero_()
    assert same_tensors(read_all(find(tmp_path)), make_tensors(1))


def test_the_real_disk_does_what_the_stopping_disk_stands_for(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    for step in (1, 2, 3, 2, 3, 4):
        all_ranks(save_world(tmp_path, step, make_layout(tensors, 2, step), disks=[Disk(), Disk()]))
    assert same_tensors(read_all(find(tmp_path)), tensors) and list_steps(tmp_path) == [4, 3]
    only_these_steps_and_files(tmp_path, {3, 4})
