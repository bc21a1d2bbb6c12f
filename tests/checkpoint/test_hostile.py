"""A checkpoint that somebody made to hurt: nothing in it runs, nothing outside its folder changes, nothing hangs."""

import io
import json
import os
import shutil
import socket
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megagrok.checkpoint import Fragment, find_checkpoint, take_over
from megagrok.checkpoint.commit import digest_of
from megagrok.checkpoint.fence import Unfenced
from megagrok.cli import main
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import Alone
from tests.checkpoint.worlds import Tensors, all_ranks, find, read_all, same_tensors, save_steps, save_world

SHARD, COMMIT = "rank-00000.safetensors", "COMMIT.json"
LIMIT_SECONDS = 2.0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Tensors]]:
    """A run with three checkpoints, to be copied."""
    root = tmp_path_factory.mktemp("sound")
    return root, save_steps(root, [10, 20, 30])


@pytest.fixture
def scene(sound: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> "Scene":
    return Scene(tmp_path, *sound)


def save(root: Path, step: int) -> None:
    """A small checkpoint, and the removal of older ones; nothing waits for the medium."""
    all_ranks(save_world(root, step, [[Fragment("x", (3,), (0,), (3,), 0, 3, torch.ones(3))]]))


class Scene:
    """An attacked run: the step folder to fill with malice, a place outside that must stay as it is, and a mark."""

    def __init__(self, folder: Path, sound: Path, tensors: dict[int, Tensors]) -> None:
        self.root, self.outside, self.mark = folder / "run", folder / "outside", folder / "mark"
        self.sound = tensors
        shutil.copytree(sound, self.root)
        self.step = self.root / "step-00000030"
        self.outside.mkdir()
        (self.outside / "precious").write_bytes(b"precious")
        shutil.copytree(self.step, self.outside / "step")

    def pickle(self, protocol: int) -> bytes:
        """Unpickled, it leaves a mark. Spelt out, because no file of the house may import what makes it."""
        head = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
        return head + f"cos\nmkdir\n(S{str(self.mark)!r}\ntR.".encode()

    def torch_save(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickle(2))
            archive.writestr("archive/version", "3\n")
        return buffer.getvalue()

    def put(self, name: str, data: bytes) -> None:
        (self.step / name).unlink(missing_ok=True)
        (self.step / name).write_bytes(data)

    def resign(self, change: Callable[[dict[str, object]], object]) -> None:
        page = json.loads((self.step / COMMIT).read_bytes())["commit"]
        change(page)
        self.sign(json.dumps(page).encode())

    def sign(self, body: bytes) -> None:
        self.put(COMMIT, b'{"digest":"' + digest_of(body).encode() + b'","commit":' + body + b"}\n")

    def link(self, name: str, target: Path) -> None:
        (self.step / name).unlink(missing_ok=True)
        (self.step / name).symlink_to(target)

    def fifo(self, name: str) -> None:
        (self.step / name).unlink(missing_ok=True)
        os.mkfifo(self.step / name)

    def folder(self, name: str) -> None:
        (self.step / name).unlink(missing_ok=True)
        (self.step / name).mkdir()

    def socket(self, name: str) -> None:
        (self.step / name).unlink(missing_ok=True)
        here = os.open(self.step, os.O_RDONLY)
        try:
            # Through /proc: the name of a socket has a hundred bytes at the most.
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{here}/{name}")
        finally:
            os.close(here)

    def archive(self) -> bytes:
        """Members that leave the folder they are unpacked in."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("../../outside/precious", b"owned")
            file.writestr("archive/data.pkl", self.pickle(2))
        return buffer.getvalue()

    def tar(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            member = tarfile.TarInfo("../../outside/precious")
            member.size = 5
            file.addfile(member, io.BytesIO(b"owned"))
        return buffer.getvalue()

    def rename_shard(self, name: str) -> None:
        def change(page: dict[str, object]) -> None:
            page["files"][0]["name"] = name  # type: ignore[index]

        self.resign(change)

    def safetensors(self, header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header


def fact(key: str, value: object) -> Callable[[Scene], object]:
    """A sound page whose facts hold something that a careless reader might run, open or print."""
    return lambda scene: scene.resign(lambda page: page["facts"].update({key: value}))  # type: ignore[attr-defined]


DEEP = b"[" * 100_000 + b"]" * 100_000
NAMES = (
    "../../outside/precious", "/etc/passwd", "..", ".", "", "rank-00000.safetensors/../../x",
    "rank-00000.safetensors\n", "rank-٠٠٠٠٠.safetensors", "rank-00000.pt",
    "$(touch mark)", "`touch mark`", "; touch mark", "\0", "a" * 100_000,
)  # fmt: skip
HOSTILE: dict[str, Callable[[Scene], object]] = {
    **{f"pickle {n} as a shard": lambda s, n=n: s.put(SHARD, s.pickle(n)) for n in range(6)},
    **{f"pickle {n} as COMMIT.json": lambda s, n=n: s.put(COMMIT, s.pickle(n)) for n in range(6)},
    "torch.save as a shard": lambda s: s.put(SHARD, s.torch_save()),
    "torch.save as COMMIT.json": lambda s: s.put(COMMIT, s.torch_save()),
    **{
        f"pickle beside, {name}": lambda s, name=name: s.put(name, s.torch_save())
        for name in (".metadata", "model.pt", "optimizer.bin", "__0_0.distcp", "common.pth", "rank-00002.safetensors")
    },
    "zip that climbs out, as a shard": lambda s: s.put(SHARD, s.archive()),
    "tar that climbs out, as a shard": lambda s: s.put(SHARD, s.tar()),
    "tar that climbs out, as COMMIT.json": lambda s: s.put(COMMIT, s.tar()),
    "header of 16 EB": lambda s: s.put(SHARD, b"\xff" * 8 + b"{}"),
    "header of 1 TB": lambda s: s.put(SHARD, (1 << 40).to_bytes(8, "little") + b"{}"),
    "header with NaN": lambda s: s.put(SHARD, s.safetensors(b'{"a":NaN}')),
    "header that is deep": lambda s: s.put(SHARD, s.safetensors(DEEP)),
    "empty shard": lambda s: s.put(SHARD, b""),
    "empty COMMIT.json": lambda s: s.put(COMMIT, b""),
    "shard of 1 TB of holes": lambda s: os.truncate(s.step / SHARD, 1 << 40),
    "COMMIT.json of 1 TB of holes": lambda s: os.truncate(s.step / COMMIT, 1 << 40),
    **{f"{what} {name}": lambda s, make=make, name=name: make(s, name)
       for name in (SHARD, COMMIT)
       for what, make in {
           "link to /etc/passwd as": lambda s, name: s.link(name, Path("/etc/passwd")),
           "link to /dev/zero as": lambda s, name: s.link(name, Path("/dev/zero")),
           "link to itself as": lambda s, name: s.link(name, s.step / name),
           "link to a sound file as": lambda s, name: s.link(name, s.outside / "step" / name),
           "link to nothing as": lambda s, name: s.link(name, s.outside / "nothing"),
           "pipe as": Scene.fifo,
           "folder as": Scene.folder,
           "socket as": Scene.socket,
       }.items()},
    **{f"page {body[:24]!r}": lambda s, body=body: s.sign(body) for body in (
        b"", b"null", b"[]", b'"x"', b"1e999", b"{}", b'{"format":1}', b'{"format":1,"format":1}', b'{"format":NaN}',
        b'{"format":Infinity}', b'{"format":' + b"9" * 100_000 + b"}", b"-" * 1000, DEEP, b'{"a":' * 50_000,
        b"\xef\xbb\xbf{}", '{"format":1}'.encode("utf-16"), b'{"format":1}\x00', b'{"\\ud800":1}', b"\xff\xfe\xfd",
        b'{"format":1,"step":1e3,"facts":{},"tensors":{},"files":[]}', b"__import__('os').mkdir('mark')",
        b"!!python/object/apply:os.mkdir ['mark']",
    )},
    **{f"shard called {name[:24]!r}": lambda s, name=name: s.rename_shard(name) for name in NAMES},
    "code among the facts": fact("config", {"_target_": "os.mkdir", "path": "mark", "tokenizer": "$(touch mark)"}),
    "terminal sequences among the facts": fact("torch", "\x1b]0;owned\x07\x1b[2J"),
    "a path as the run's name": fact("run_id", "../../outside/precious"),
    "deep facts": fact("data", json.loads("[" * 500 + "]" * 500)),
    "a number too large for a float": fact("data", {"consumed_samples": 10**400}),
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_runs_nothing_outside_changes_and_no_wrong_byte_is_read(
    attack: Callable[[Scene], object],
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    attack(scene)
    before, started = tree(scene.outside), time.monotonic()
    found = find(scene.root)
    assert found.step in (20, 30) and same_tensors(read_all(found), scene.sound[found.step])
    try:
        find(scene.root, step=30)
        assert found.step == 30
    except CheckpointError as error:
        assert found.step == 20 and "step-00000030" in str(error)
    for command in (["list"], ["verify"], ["show"], ["reshard", "--step", "30", "--files", "2", str(tmp_path / "out")]):
        assert main(["ckpt", *command[:1], str(scene.root), *command[1:]]) in (0, 4), command
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and "Traceback" not in said
    assert time.monotonic() - started < LIMIT_SECONDS * 4

    take_over(scene.root, Unfenced())
    save(scene.root, 40)
    save(scene.root, 50)
    assert sorted(path.name for path in scene.root.iterdir()) == ["latest", "step-00000040", "step-00000050"]
    assert not scene.mark.exists() and not (tmp_path / "mark").exists() and tree(scene.outside) == before


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(HOSTILE) >= 80


LINKS: dict[str, Callable[[Scene], Path]] = {
    "a step": lambda s: s.root / "step-00000040",
    "a step that was set aside": lambda s: s.root / "step-00000041.aside",
    "a save that is under way": lambda s: s.root / "step-00000042.tmp",
    "a save of another start": lambda s: s.root / "step-00000043.g1.tmp",
    "the hint": lambda s: s.root / "latest",
    "the hint that is being written": lambda s: s.root / "latest.tmp",
}


@pytest.mark.parametrize("place", LINKS.values(), ids=LINKS.keys())
@pytest.mark.parametrize("target", ["step", "precious", "nothing"])
def test_a_link_is_removed_and_what_it_leads_to_is_not(
    place: Callable[[Scene], Path], target: str, scene: Scene
) -> None:
    place(scene).unlink(missing_ok=True)
    place(scene).symlink_to(scene.outside / target)
    before = tree(scene.outside)
    found = find_checkpoint(scene.root, ranks=Alone())
    assert found is not None and found.step == 30
    save(scene.root, 44)
    save(scene.root, 45)
    assert tree(scene.outside) == before and find(scene.root).step == 45
    assert (scene.root / "latest").read_text() == "step-00000045\n" and not (scene.root / "latest").is_symlink()


STRANGE = ("step-٠٠٠٠٠٠٣٠", "step--0000001", "step-99999999999999999999", "step-0x000030", "step-00000030 ", "step-1e8")


@pytest.mark.parametrize("name", STRANGE)
def test_a_folder_whose_name_is_no_step_is_nobodys(name: str, scene: Scene) -> None:
    scene.step.rename(scene.root / name)
    assert find(scene.root).step == 20
    take_over(scene.root, Unfenced())
    assert (scene.root / name).exists()
