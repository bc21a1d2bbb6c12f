"""Keys stay in the environment: no file of a run, no script, no word of output and no command line has one of them."""

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagrok.errors import EXIT_BUG, EXIT_TRANSIENT
from megagrok.train.files import RunFiles
from tests.config.conftest import TINY
from tests.login_node import LoginNode
from tests.train.commands import Command, steps_in, wait_until

CANARY = "canary7c1f"
SECRETS = {
    # 40 hex digits, as W&B's keys have.
    "WANDB_API_KEY": (CANARY.encode().hex() * 2)[:40],
    "HF_TOKEN": f"hf_{CANARY}{'a' * 24}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws",
    "OPENAI_API_KEY": f"sk-{CANARY}{'b' * 24}",
    "HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:9",
    "PIP_INDEX_URL": f"https://me:{CANARY}@packages.example/simple",
}
NEEDLES = (CANARY.encode(), SECRETS["WANDB_API_KEY"].encode())
RUN = TINY.replace("  tokens: corpus", "  sources:\n    - kind: python_stdlib\n      max_bytes: 200_000") + (
    "  tokenizer_vocab_size: 300\n  held_out_fraction: 0.1\nparallel:\n  data: 2\ntelemetry:\n  wandb: offline\n"
)
CLUSTER = 'walltime: "00:30:00"\ngpus_per_node: 0\nranks_per_node: 2\nsignal_lead_seconds: 60\n'


@contextmanager
def command_lines(command: Command) -> Iterator[set[bytes]]:
    """Collects the command lines of the command and of all that it starts, as `ps` would show them."""
    seen: set[bytes] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            for pid in command.alive():
                try:
                    seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def leaks(folder: Path) -> list[str]:
    """Every file below the folder that has a needle in its bytes or its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert files
    return [
        str(path.relative_to(folder))
        for path in files
        if any(needle in path.read_bytes() or needle in str(path).encode() for needle in NEEDLES)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout whose remote has a token in its address, which W&B writes down and has to take out."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    for words in (["init", "-q"], ["remote", "add", "origin", f"https://{CANARY}@git.example/x.git"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.fault("F37")
def test_a_run_that_crashes_saves_goes_on_and_is_rendered_leaves_no_secret(folder: Path) -> None:
    files = RunFiles(folder / "runs" / "t")
    command = Command("train", "run.yaml", "checkpoint.every_steps=1", folder=folder, environment=SECRETS)
    with command_lines(command) as seen:
        wait_until(lambda: 3 in steps_in(files), command)
        subprocess.run(["kill", "-KILL", str(command.ranks()[1])], check=True)
        assert command.wait().status == EXIT_TRANSIENT
    assert len(seen) > 0 and not any(needle in line for line in seen for needle in NEEDLES)

    command = Command("train", "run.yaml", folder=folder, environment=SECRETS)
    with command_lines(command) as seen:
        done = command.wait()
    assert done.status == 0, done.err
    assert not any(needle in line for line in seen for needle in NEEDLES)
    assert list(files.root.glob("wandb/offline-run-*/*.wandb")), "W&B wrote nothing to look into"

    bad = Command("train", "run.yaml", "name=bad", "optimizer.lr=1.0e+30", folder=folder, environment=SECRETS).wait()
    assert bad.status == EXIT_BUG, bad.err

    with LoginNode() as login:
        place = folder / "desk"
        place.mkdir()
        for words in (["render"], ["submit", "--dry-run"]):
            shown = login.run(
                ["slurm", *words, "../run.yaml", "--cluster", "../cluster.yaml"], place, SECRETS | {"PATH": "/nowhere"}
            )
            assert shown.status == 0, shown.err
            (place / f"{words[0]}.txt").write_text(shown.out + shown.err)
    assert "#SBATCH" in (place / "render.txt").read_text()
    assert leaks(folder) == []


def test_the_search_finds_what_it_is_there_to_find(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log").write_bytes(b"\x00\xffkey=" + SECRETS["HF_TOKEN"].encode() + b"\x00")
    (tmp_path / "log").write_text(SECRETS["WANDB_API_KEY"])
    (tmp_path / CANARY).write_text("")
    (tmp_path / "good").write_text("nothing")
    assert sorted(leaks(tmp_path)) == [CANARY, "deep/log", "log"]
