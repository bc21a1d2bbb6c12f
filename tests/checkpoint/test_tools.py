"""`megagrok ckpt`: what a person does to checkpoints without the model. It finds all damage and loses nothing sound."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagrok.checkpoint import list_steps, verify_checkpoint
from megagrok.checkpoint.catalog import checkpoints_of
from megagrok.checkpoint.commit import read_commit
from megagrok.checkpoint.reshard import reshard
from megagrok.cli import main
from megagrok.errors import CheckpointError
from tests.checkpoint.worlds import (
    Tensors,
    all_ranks,
    find,
    make_layout,
    make_tensors,
    read_all,
    same_tensors,
    save_steps,
    save_world,
)


def ckpt(*arguments: object) -> int:
    return main(["ckpt", *map(str, arguments)])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[int, Tensors]]:
    """The folder of a run with four checkpoints of two ranks."""
    return tmp_path / "run", save_steps(tmp_path / "run" / "checkpoints", [10, 20, 30, 40])


def shard(run: Path, step: int, rank: int = 1) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / f"rank-{rank:05d}.safetensors"


def test_the_list_says_what_is_there_and_what_is_wrong(
    run: tuple[Path, dict[int, Tensors]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = run[0] / "checkpoints"
    shard(run[0], 30).unlink()
    damage(root / "step-00000020" / "COMMIT.json")
    (root / "step-00000010").rename(root / "step-00000010.aside")
    for folder in (run[0], root):
        assert ckpt("list", folder) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["step", "size", "files", "saved", "run", "start", "state"]
        assert [line.split()[0] for line in lines] == ["40", "30", "20", "10.aside"]
        assert lines[0].endswith("sound (digests not read)") and " law " in lines[0] and " 2 " in lines[0]
        assert "rank-00001.safetensors: cannot be opened" in lines[1] and "COMMIT.json: its digest is" in lines[2]
    shutil.rmtree(root / "step-00000040")
    shutil.rmtree(root / "step-00000010.aside")
    assert ckpt("list", root) == 4


def test_verify_names_every_damaged_file_and_ends_with_4(
    run: tuple[Path, dict[int, Tensors]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ckpt("verify", run[0]) == 0 and capsys.readouterr().out.count(": sound\n") == 4
    damage(shard(run[0], 20))
    damage(shard(run[0], 40, rank=0))
    assert ckpt("verify", run[0]) == 4
    out = capsys.readouterr().out
    assert f"step-00000040: DAMAGED\n  {shard(run[0], 40, rank=0)}: its digest is " in out
    assert f"step-00000020: DAMAGED\n  {shard(run[0], 20)}: its digest is " in out and out.count(": sound\n") == 2
    assert ckpt("verify", run[0], "--step", 30) == 0 and ckpt("verify", run[0], "--step", 20) == 4
    assert ckpt("verify", run[0], "--step", 25) == 4
    assert "no checkpoint of step 25; it has 40, 30, 20, 10" in capsys.readouterr().err


def test_show_says_what_is_inside_and_cannot_be_made_to_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {
        "run_id": "a1f",
        "generation": 3,
        "torch": "2.13\x1b]0;owned\x07",
        "config": {"parallel": {"tensor": 2, "data": 4}, "secret": "no"},
        "data": {"consumed_samples": 160, "left_out": list(range(1000))},
    }
    all_ranks(save_world(tmp_path, 40, make_layout(make_tensors(1), 2, 1), facts=facts))
    assert ckpt("show", tmp_path) == 0
    out = capsys.readouterr().out
    assert "step        40\n" in out and "generation  3\n" in out and "layout      data 4, tensor 2\n" in out
    assert "consumed_samples: 160" in out and "exp_avg: 1 of F32, 510 elements, 2.0 kB" in out
    assert "weight/model.layers.0.self_attn.q_proj.weight" in out and "[40, 24]" in out
    assert "\x1b" not in out and "secret" not in out and max(map(len, out.splitlines())) < 160


@pytest.mark.parametrize("num_files", [1, 2, 3, 7, 40])
def test_resharding_changes_the_files_and_no_bit(
    run: tuple[Path, dict[int, Tensors]], tmp_path: Path, capsys: pytest.CaptureFixture[str], num_files: int
) -> None:
    out = tmp_path / "out"
    assert ckpt("reshard", run[0], "--step", 20, "--files", num_files, out) == 0
    assert f"in {num_files} files, verified bit by bit" in capsys.readouterr().out
    assert (
        same_tensors(read_all(find(out)), run[1][20]) and find(out).facts == find(run[0] / "checkpoints", step=20).facts
    )
    assert verify_checkpoint(out / "step-00000020") == [] and not list(out.glob("*.tmp"))
    sizes = [file.size_bytes - file.entries[0].offset for file in read_commit(out / "step-00000020")[0].files]
    # The last ones may be empty where there are more files than bytes to go round.
    assert len(sizes) == num_files and max(sizes) - min(sizes) < 32
    assert ckpt("reshard", run[0], "--step", 20, "--files", 2, out) == 4
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(8))
def test_resharding_any_layout_of_any_tensors_gives_them_back(tmp_path: Path, seed: int) -> None:
    tensors = make_tensors(seed) | {"empty": make_tensors(seed)["step"].reshape(1)[:0].clone()}
    all_ranks(save_world(tmp_path / "in", 5, make_layout(tensors, 3, seed)))
    files = random.Random(seed).randint(1, 60)
    assert same_tensors(
        read_all(find(reshard(tmp_path / "in" / "step-00000005", tmp_path / "out", files).parent)), tensors
    )


def test_resharding_a_damaged_checkpoint_leaves_nothing(run: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    rng = random.Random(1)
    path = shard(run[0], 40)
    sound = path.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for number in range(20):
        content = bytearray(sound)
        content[rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="rank-00001.safetensors"):
            reshard(path.parent, tmp_path / str(number), 3)
        assert not list((tmp_path / str(number)).iterdir())


def test_prune_keeps_as_many_sound_ones_as_asked_and_never_fewer_than_two(
    run: tuple[Path, dict[int, Tensors]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = run[0] / "checkpoints"
    damage(shard(run[0], 40))
    damage(shard(run[0], 20))
    assert ckpt("prune", run[0], "--keep", 1) == 2
    assert ckpt("prune", run[0], "--keep", 3) == 0 and list_steps(root) == [40, 30, 20, 10]
    assert ckpt("prune", run[0], "--keep", 2) == 0 and list_steps(root) == [40, 30, 20, 10]
    save_steps(root, [50])
    assert ckpt("prune", run[0], "--keep", 2) == 0
    assert list_steps(root) == [50, 40, 30] and "removed 20, 10; kept 50, 40, 30" in capsys.readouterr().out


def test_what_was_set_aside_stays_while_its_replacement_is_damaged(run: tuple[Path, dict[int, Tensors]]) -> None:
    root = run[0] / "checkpoints"
    shutil.copytree(root / "step-00000040", root / "step-00000040.aside")
    damage(shard(run[0], 40))
    assert ckpt("prune", run[0], "--keep", 2) == 0
    assert (root / "step-00000040.aside").exists() and list_steps(root) == [40, 30, 20]


def test_a_folder_without_checkpoints_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt("list", tmp_path) == 4 and "has no checkpoints" in capsys.readouterr().err
    (tmp_path / ".metadata").touch()
    assert ckpt("verify", tmp_path) == 4 and "pickle checkpoints are not loaded" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no checkpoints"):
        checkpoints_of(tmp_path / "nothing")


def test_the_commands_need_neither_megatron_nor_deepspeed(run: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    script = (
        "import sys; from megagrok.cli import main; run, out = sys.argv[1:]\n"
        "for a in (['list', run], ['verify', run], ['show', run], ['reshard', run, '--files', '2', out],"
        " ['prune', run, '--keep', '2']): assert main(['ckpt', *a]) == 0, a\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'deepspeed')]\n"
    )
    command = [sys.executable, "-c", script, str(run[0]), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2], env=dict(os.environ))
