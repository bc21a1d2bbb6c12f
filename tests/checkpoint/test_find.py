"""All ranks go on from one step, whatever each of them sees; None means that there was never anything."""

import os
import shutil
from pathlib import Path

import pytest

from megagrok.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_steps,
    require_one_run,
    save_checkpoint,
    verify_checkpoint,
)
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import Alone, Ranks
from tests.checkpoint.worlds import (
    Tensors,
    all_ranks,
    find,
    make_layout,
    make_tensors,
    read_all,
    run_world,
    same_tensors,
    save_steps,
    save_world,
)
from tests.ranks import run_ranks


def find_on_each(roots: list[Path], step: int | None = None) -> list[Checkpoint | None | BaseException]:
    """One rank a root: where the roots differ, the ranks see different disks."""

    def work(ranks: Ranks) -> Checkpoint | None:
        return find_checkpoint(roots[ranks.rank], ranks=ranks, step=step)

    return run_world(len(roots), work)


def test_none_means_that_there_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "never", ranks=Alone()) is None
    assert find_checkpoint(tmp_path, ranks=Alone()) is None
    (tmp_path / "step-00000001.tmp").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes").mkdir()
    assert find_checkpoint(tmp_path, ranks=Alone()) is None and list_steps(tmp_path) == []


def test_the_newest_sound_checkpoint_is_found_and_a_named_one_is_honoured(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, [9, 10, 100, 123456789])
    assert list_steps(tmp_path) == [123456789, 100, 10, 9]
    assert find(tmp_path).step == 123456789
    for step, tensors in saved.items():
        assert same_tensors(read_all(find(tmp_path, step=step)), tensors)
    with pytest.raises(CheckpointError, match="no checkpoint of step 11; it has 123456789, 100, 10, 9"):
        find(tmp_path, step=11)


def test_a_folder_without_a_commit_is_skipped_with_its_reason(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "step-00000002").mkdir()
    found = find(tmp_path)
    assert found.step == 1 and "step-00000002/COMMIT.json: cannot be opened: No such file" in found.skipped[0]
    (tmp_path / "step-00000001" / "COMMIT.json").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        find(tmp_path)


def test_a_root_that_is_a_file_is_an_error_and_not_an_absence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        find(tmp_path / "file")


def test_what_was_set_aside_is_used_if_it_is_asked_for_or_if_there_is_nothing_else(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, [1, 2])
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.aside")
    assert find(tmp_path).step == 1
    assert same_tensors(read_all(find(tmp_path, step=2)), saved[2])
    shutil.rmtree(tmp_path / "step-00000001")
    assert same_tensors(read_all(find(tmp_path)), saved[2])
    save_steps(tmp_path, [3], keep=2)
    assert same_tensors(read_all(find(tmp_path, step=2)), saved[2])
    save_steps(tmp_path, [4], keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000005.aside")
    with pytest.raises(CheckpointError, match="step-00000005.aside/COMMIT.json: is of step 3"):
        find(tmp_path, step=5)


def test_ranks_agree_on_the_newest_step_that_all_of_them_see(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", [1, 2, 3])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step-00000003")
    found = all_ranks(find_on_each([tmp_path / "a", tmp_path / "b", tmp_path / "a"]))
    assert [checkpoint.step for checkpoint in found if checkpoint] == [2, 2, 2]
    assert all("rank 1: " in checkpoint.skipped[0] for checkpoint in found if checkpoint)


def test_damage_that_one_rank_finds_is_known_to_all(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2], world_size=4)
    path = tmp_path / "step-00000002" / "rank-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0" if path.read_bytes()[-1] else path.read_bytes()[:-1] + b"\1")
    for world_size in (1, 2, 4, 5):
        found = all_ranks(find_on_each([tmp_path] * world_size))
        assert all(checkpoint and checkpoint.step == 1 and str(path) in checkpoint.skipped[0] for checkpoint in found)
        outcomes = find_on_each([tmp_path] * world_size, step=2)
        assert all(isinstance(outcome, CheckpointError) for outcome in outcomes) and len(set(map(str, outcomes))) == 1


def test_ranks_that_see_two_checkpoints_of_one_step_use_neither(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", [1])
    all_ranks([None])
    save_steps(tmp_path / "b", [1], world_size=1)
    outcomes = find_on_each([tmp_path / "a", tmp_path / "b"])
    assert all(isinstance(outcome, CheckpointError) and "different COMMIT.json" in str(outcome) for outcome in outcomes)


def test_a_stranger_in_the_folder_is_reported_and_does_no_harm(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    stranger = tmp_path / "step-00000001" / "rank-00009.safetensors"
    stranger.write_bytes(b"x")
    assert verify_checkpoint(tmp_path / "step-00000001") == [f"{stranger}: is not in COMMIT.json"]
    assert find(tmp_path).step == 1


FOREIGN = {
    "torch.distributed.checkpoint": "iter_0000010/.metadata",
    "one of its files": "__0_0.distcp",
    "megatron": "latest_checkpointed_iteration.txt",
    "deepspeed": "global_step10/mp_rank_00_model_states.pt",
    "transformers": "pytorch_model.bin",
}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_checkpoint_of_another_program_is_no_empty_folder_and_is_never_opened(tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    path = root / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    outcomes = find_on_each([root, root])
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes) and len(set(map(str, outcomes))) == 1
    assert f"{path} is a checkpoint of another program: pickle checkpoints are not loaded" in str(outcomes[0])
    save_steps(root, [1])
    assert find(root).step == 1


def test_a_step_whose_files_are_another_programs_is_passed_over_in_plain_words(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "model.pt").write_bytes(b"\x80\x04.")
    found = find(tmp_path)
    assert found.step == 1 and "step-00000002/model.pt: pickle checkpoints are not loaded" in found.skipped[0]


def test_checkpoints_of_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    for step, run_id in ((1, "a1f"), (2, "a1f"), (3, "b2e")):
        all_ranks(save_world(tmp_path, step, make_layout(make_tensors(1), 1, 1), keep=9, facts={"run_id": run_id}))
    with pytest.raises(CheckpointError, match="2 runs: steps 3 of run b2e; steps 2, 1 of run a1f"):
        require_one_run(tmp_path)
    damaged = tmp_path / "step-00000003" / "COMMIT.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    require_one_run(tmp_path)
    require_one_run(tmp_path / "none")


def save_and_read(ranks: Ranks, root: Path) -> tuple[int, Tensors, str]:
    """What every process of a real world does: save, find, read all, and fail together."""
    layout = make_layout(make_tensors(4), ranks.world_size, 4)
    save_checkpoint(root, 4, layout[ranks.rank], {"run_id": "real"}, ranks=ranks, keep=2)
    found = find_checkpoint(root, ranks=ranks)
    assert found is not None
    layout[1].clear()
    try:
        save_checkpoint(root, 5, layout[ranks.rank], {"run_id": "real"}, ranks=ranks, keep=2)
    except CheckpointError as error:
        return found.step, read_all(found), str(error)
    raise AssertionError("an incomplete checkpoint was committed")


def test_real_processes_save_find_read_and_fail_together(tmp_path: Path) -> None:
    results = run_ranks(save_and_read, 2, root=tmp_path)
    assert all(step == 4 and same_tensors(tensors, make_tensors(4)) for step, tensors, _ in results)
    assert results[0][2] == results[1][2] and "incomplete" in results[0][2]
    assert list_steps(tmp_path) == [4] and not list(tmp_path.glob("*.tmp"))
