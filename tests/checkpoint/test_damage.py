"""No wrong byte reaches the model: damage of any kind, at any place, is refused by the name of the file."""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrok.checkpoint import find_checkpoint, list_steps, verify_checkpoint
from megagrok.checkpoint.commit import digest_of
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import Alone
from tests.checkpoint.worlds import (
    Tensors,
    all_ranks,
    find,
    make_layout,
    read_all,
    same_tensors,
    save_steps,
    save_world,
)

STEPS = (10, 20, 30)


def flip_bit(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_a_page(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    begin = rng.randrange(len(data))
    end = min(begin + 4096, len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random, other: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def swap_between_steps(path: Path, rng: random.Random, other: Path) -> None:
    shutil.copy(other, path)


def swap_two_parts(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    cut = rng.randrange(1, len(data))
    path.write_bytes(data[cut:] + data[:cut])


MUTATIONS = (flip_bit, zero_a_page, truncate, lengthen, delete, swap_between_steps, swap_two_parts)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Tensors]]:
    """Three checkpoints of two ranks whose layouts, and so file sizes, are the same."""
    root = tmp_path_factory.mktemp("sound")
    rng = torch.Generator().manual_seed(1)
    tensors: dict[int, Tensors] = {}
    for step in STEPS:
        tensors[step] = {"a": torch.randn(40, 30, generator=rng), "b": torch.randn(900, generator=rng).bfloat16()}
        all_ranks(save_world(root, step, make_layout(tensors[step], 2, 1), keep=3))
    return root, tensors


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.fault("F17")
def test_every_mutation_is_refused_by_file_name_and_no_wrong_byte_is_read(
    mutate: Callable[[Path, random.Random, Path], None], sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    for seed in range(30):
        check_mutation(mutate, f"{mutate.__name__} {seed}", sound, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_a_thousand_mutations_are_refused(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    for seed in range(1000):
        check_mutation(MUTATIONS[seed % len(MUTATIONS)], f"thousand {seed}", sound, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def check_mutation(
    mutate: Callable[[Path, random.Random, Path], None],
    seed: str,
    sound: tuple[Path, dict[int, Tensors]],
    copy: Path,
) -> None:
    """One file of the newest of three checkpoints, damaged: refused by name, and the one before it is found."""
    root, tensors = sound
    rng = random.Random(seed)
    shutil.copytree(root, copy)
    name = rng.choice(("rank-00000.safetensors", "rank-00001.safetensors", "COMMIT.json"))
    path, other = copy / "step-00000030" / name, copy / "step-00000020" / name
    before = path.read_bytes()
    while path.exists() and path.read_bytes() == before:  # a page that was zero already, say
        mutate(path, rng, other)

    assert any(name in problem for problem in verify_checkpoint(copy / "step-00000030"))
    with pytest.raises(CheckpointError, match=name):
        find(copy, step=30)
    fallen_back = find(copy)
    assert fallen_back.step == 20 and same_tensors(read_all(fallen_back), tensors[20])
    assert len(fallen_back.skipped) == 1 and name in fallen_back.skipped[0]
    # Without the digests of whole files the damage is met at the read, or lies in a header that no read uses.
    hasty = find(copy, verify="sizes")
    try:
        assert same_tensors(read_all(hasty), tensors[hasty.step])
    except CheckpointError as error:
        assert name in str(error)


@pytest.mark.fault("F18")
def test_if_all_are_damaged_nothing_starts_from_scratch(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    for number, step in enumerate(STEPS):
        MUTATIONS[number](copy / f"step-{step:08d}" / "rank-00001.safetensors", random.Random(step), Path())
    with pytest.raises(CheckpointError, match="none of 3 checkpoints is sound") as caught:
        find_checkpoint(copy, ranks=Alone())
    assert caught.value.exit_code == 4
    for step in STEPS:
        assert f"step-{step:08d}/rank-00001.safetensors" in str(caught.value)


def test_folders_that_changed_names_are_refused(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    (copy / "step-00000030").rename(copy / "step-00000040")
    with pytest.raises(CheckpointError, match="step-00000040/COMMIT.json: is of step 30"):
        find(copy, step=40)
    assert find(copy).step == 20 and list_steps(copy) == [20, 10]


def test_a_file_that_changes_after_it_was_found_is_refused_at_the_read(
    sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    found = find(copy)
    for rank in range(2):
        path = found.path / f"rank-{rank:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="digest"):
        read_all(found)
    for rank in range(2):
        os.truncate(found.path / f"rank-{rank:05d}.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"rank-0000.\.safetensors: has 100 bytes"):
        read_all(found)


def test_a_file_that_changes_during_reads_gives_the_right_bytes_or_an_error(
    sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    path = copy / "step-00000030" / "rank-00000.safetensors"
    right, finished = path.read_bytes(), threading.Event()

    def disturb() -> None:
        with open(path, "r+b", buffering=0) as file:
            while not finished.is_set():
                for at in (len(right) - 1, len(right) // 2):
                    os.pwrite(file.fileno(), bytes([right[at] ^ 4]), at)
                    os.pwrite(file.fileno(), right[at : at + 1], at)

    writer = threading.Thread(target=disturb)
    writer.start()
    outcomes = {"right": 0, "refused": 0}
    try:
        for _ in range(200):
            try:
                assert same_tensors(read_all(find(copy, step=30, verify="sizes")), sound[1][30])
                outcomes["right"] += 1
            except CheckpointError as error:
                assert "rank-00000.safetensors" in str(error)
                outcomes["refused"] += 1
    finally:
        finished.set()
        writer.join()
    assert sum(outcomes.values()) == 200


def test_links_and_pipes_are_not_followed(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    for number, name in enumerate(("rank-00000.safetensors", "COMMIT.json")):
        copy = tmp_path / str(number)
        shutil.copytree(sound[0], copy)
        path = copy / "step-00000030" / name
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            find(copy, step=30)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
            find(copy, step=30)


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite COMMIT.json as an attacker would: changed, with a digest that fits."""
    page = json.loads((folder / "COMMIT.json").read_bytes())["commit"]
    change(page)
    write_signed(folder, json.dumps(page).encode())


def write_signed(folder: Path, body: bytes) -> None:
    (folder / "COMMIT.json").write_bytes(b'{"digest":"' + digest_of(body).encode() + b'","commit":' + body + b"}\n")


def entry(page: dict[str, Any], field: int, value: object) -> None:
    page["files"][0]["entries"][0][field] = value


def claim_everything(page: dict[str, Any]) -> None:
    """A tensor of an exabyte, all of whose pieces are the same few bytes of the file."""
    page["tensors"]["huge"] = ["F64", [1 << 57]]
    page["files"][0]["entries"].append(["huge", [0], [1 << 57], 0, 1 << 57, 8, "0" * 32])


def read_one_file_as_two(page: dict[str, Any]) -> None:
    """Other tensors from the bytes of a file that is accounted for already."""
    again = json.loads(json.dumps(page["files"]))
    for file in again:
        for item in file["entries"]:
            item[0] += "2"
    page["tensors"] |= {name + "2": info for name, info in page["tensors"].items()}
    page["files"] += again


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "older format": lambda page: page.update(format=0),
    "format of another type": lambda page: page.update(format=True),
    "unknown key": lambda page: page.update(run=1),
    "missing key": lambda page: page.pop("facts"),
    "step of another folder": lambda page: page.update(step=31),
    "negative step": lambda page: page.update(step=-1),
    "step is a boolean": lambda page: page.update(step=True),
    "parent folder": lambda page: page["files"][0].update(name="../rank-00000.safetensors"),
    "absolute name": lambda page: page["files"][0].update(name="/etc/passwd"),
    "name with a newline": lambda page: page["files"][0].update(name="rank-00000.safetensors\n"),
    "name with a zero byte": lambda page: page["files"][0].update(name="rank-00000\0.safetensors"),
    "name that goes on": lambda page: page["files"][0].update(name="rank-00000.safetensors/../rank-00000.safetensors"),
    "pickle": lambda page: page["files"][0].update(name="rank-00000.pt"),
    "same file twice": lambda page: page["files"].append(page["files"][0]),
    "larger file": lambda page: page["files"][0].update(bytes=1 << 50),
    "size beyond any file": lambda page: page["files"][0].update(bytes=1 << 70),
    "size is text": lambda page: page["files"][0].update(bytes="12"),
    "bad digest": lambda page: page["files"][0].update(digest="x" * 32),
    "unknown dtype": lambda page: page["tensors"]["a"].__setitem__(0, "OBJECT"),
    "dtype is a list": lambda page: page["tensors"]["a"].__setitem__(0, ["F32"]),
    "wider dtype": lambda page: page["tensors"]["b"].__setitem__(0, "F64"),
    "larger tensor": lambda page: page["tensors"]["a"].__setitem__(1, [1 << 40, 30]),
    "smaller tensor": lambda page: page["tensors"]["a"].__setitem__(1, [39, 30]),
    "other dimensions": lambda page: page["tensors"]["a"].__setitem__(1, [1200]),
    "a thousand dimensions": lambda page: page["tensors"]["a"].__setitem__(1, [1] * 1000),
    "tensor without entries": lambda page: page["tensors"].update(c=["F32", [1 << 50]]),
    "entry without tensor": lambda page: page["tensors"].pop("a"),
    "entry name with a path": lambda page: entry(page, 0, "../../x"),
    "entry of another tensor": lambda page: entry(page, 0, "b" if page["files"][0]["entries"][0][0] == "a" else "a"),
    "negative start": lambda page: entry(page, 1, [-1, 0]),
    "start is a float": lambda page: entry(page, 1, [0.0, 0]),
    "range beyond the block": lambda page: entry(page, 4, 1 << 50),
    "offset before the data": lambda page: entry(page, 5, 0),
    "offset beyond the file": lambda page: entry(page, 5, 1 << 59),
    "entry digest of another length": lambda page: entry(page, 6, "00"),
    "entry is an object": lambda page: page["files"][0]["entries"].append({}),
    "entry left out": lambda page: page["files"][0]["entries"].pop(),
    "entry twice": lambda page: page["files"][0]["entries"].append(page["files"][0]["entries"][0]),
    "an exabyte from few bytes": claim_everything,
    "one file read as two": read_one_file_as_two,
    "facts are a list": lambda page: page.update(facts=[]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.fault("F36")
def test_a_hostile_commit_with_a_fitting_digest_is_refused(
    change: Callable[[dict[str, Any]], object], sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    resign(copy / "step-00000030", change)
    with pytest.raises(CheckpointError, match="step-00000030/COMMIT.json: "):
        find(copy, step=30)
    assert verify_checkpoint(copy / "step-00000030") and find(copy).step == 20


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"format":1,"format":1}',
        b'{"format":NaN}',
        b'{"format":' + b"9" * 100_000 + b"}",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"format":1e999}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_commit_that_is_no_json_object_of_ours_is_refused(
    body: bytes, sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    write_signed(copy / "step-00000030", body)
    with pytest.raises(CheckpointError, match="COMMIT.json"):
        find(copy, step=30)


def test_a_newer_format_is_refused_and_not_fallen_back_from(
    sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    resign(copy / "step-00000030", lambda page: page.update(format=7, more={"x": 1}))
    for step in (None, 30):
        with pytest.raises(CheckpointError, match=r"step-00000030/COMMIT.json: format 7, this build reads 1"):
            find_checkpoint(copy, ranks=Alone(), step=step)
    assert find(copy, step=20).step == 20


def test_a_key_that_appears_twice_is_refused(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    page = (copy / "step-00000030" / "COMMIT.json").read_bytes()
    body = page[page.index(b'"commit":') + 9 : -2].replace(b'"format":1', b'"format":1,"format":1')
    write_signed(copy / "step-00000030", body)
    with pytest.raises(CheckpointError, match="COMMIT.json: a key appears twice"):
        find(copy, step=30)


def test_an_enormous_commit_is_refused_before_it_is_read(
    sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    os.truncate(copy / "step-00000030" / "COMMIT.json", 1 << 40)
    with pytest.raises(CheckpointError, match="COMMIT.json: has 1099511627776 bytes"):
        find(copy, step=30)


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_a_hostile_safetensors_header_is_never_read(
    length: int, sound: tuple[Path, dict[int, Tensors]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound[0], copy)
    path = copy / "step-00000030" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = length.to_bytes(8, "little")
    path.write_bytes(data)
    resign(copy / "step-00000030", lambda page: page["files"][0].update(digest=digest_of(data)))
    assert same_tensors(read_all(find(copy, step=30)), sound[1][30])


def test_the_smallest_damage_to_the_smallest_checkpoint_is_found_at_every_byte(tmp_path: Path) -> None:
    save_steps(tmp_path / "first", [1])
    all_ranks(save_world(tmp_path / "run", 1, make_layout({"x": torch.arange(3.0)}, 1, 1)))
    folder = tmp_path / "run" / "step-00000001"
    for name in ("COMMIT.json", "rank-00000.safetensors"):
        data = (folder / name).read_bytes()
        for at in range(len(data)):
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert any(name in problem for problem in verify_checkpoint(folder))
        (folder / name).write_bytes(data)
    assert verify_checkpoint(folder) == []
