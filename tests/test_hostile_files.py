"""Hostile files: a hundred inputs that would run a command, write elsewhere or eat the machine if they were believed.

Every payload makes a file `pwned`, in the folder or in the home. The command that meets it ends with an exit status
that means refusal, quickly, makes no such file and writes nothing outside its folder (tests/login_node.py watches).
Commits and shards of checkpoints have a corpus of their own in tests/checkpoint/test_damage.py.
"""

import shutil
from pathlib import Path

import datasets  # noqa: F401  # once, before anything is forked
import pytest

import megagrok.telemetry.figures
import megagrok.train.finish
import megagrok.train.worker  # noqa: F401
from megagrok.train.files import RunFiles
from tests.config.conftest import TINY
from tests.login_node import LoginNode, Outcome, run_here
from tests.test_bad_inputs import CLUSTER, GOOD, NO_SLURM, SLURM, tokens

LIMIT_SECONDS = 2.0
REFUSED = (2, 3, 4, 5)
# Written out by hand: a protocol 0 pickle that calls os.system.
PICKLE = b"cposix\nsystem\n(S'touch pwned; touch ~/pwned'\ntR."

TAGS = [
    '!!python/object/apply:os.system ["touch pwned"]',
    '!!python/object/apply:subprocess.check_output [["touch", "pwned"]]',
    "!!python/object/apply:builtins.eval [\"open('pwned', 'w')\"]",
    "!!python/object/new:type {args: [z, [], {extend: !!python/name:exec }], listitems: \"open('pwned', 'w')\"}",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/object:subprocess.Popen {args: [touch, pwned]}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch pwned']",
]
PLACES = ["name: {}", "model:\n  hidden: {}", "data:\n  sources: {}", "data:\n  cache: {}", "base: {}"]
WORDS = [
    '";touch pwned"',
    "$(touch pwned)",
    "`touch pwned`",
    "x;touch pwned",
    "x\n#SBATCH --wrap=touch pwned",
    "--wrap=touch${IFS}pwned",
    "x|touch pwned",
    "x>pwned",
    "x&&touch pwned",
    "../../../../tmp/pwned",
    "x\u2028#SBATCH",
]
SITE = ["partition", "account", "constraint", "venv"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    (place / "run.yaml").write_text(GOOD)
    (place / "cluster.yaml").write_text(CLUSTER)
    return place


def assert_harmless(ended: Outcome, folder: Path, *, what: str) -> None:
    assert ended.status in REFUSED, (what, ended.status, ended.err)
    assert "Traceback" not in ended.err, (what, ended.err)
    assert ended.seconds < LIMIT_SECONDS, what
    assert ended.outside == () and not ended.met, what
    assert not list(folder.parent.rglob("pwned*")), what


def environment(folder: Path) -> dict[str, str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return NO_SLURM | {"TMPDIR": str(folder), "HOME": str(home)}


@pytest.mark.parametrize("place", PLACES)
def test_a_tag_in_a_configuration_makes_no_object(place: str, folder: Path, login: LoginNode) -> None:
    for tag in TAGS:
        (folder / "run.yaml").write_text(place.format(tag) + "\n")
        assert_harmless(login.run(["check", "run.yaml"], folder, environment(folder)), folder, what=tag)
        (folder / "cluster.yaml").write_text(f"partition: {tag}\n")
    assert_harmless(login.run(SLURM, folder, environment(folder)), folder, what="cluster file")


@pytest.mark.parametrize("key", ["name", *SITE])
def test_words_of_a_shell_become_no_part_of_a_script(key: str, folder: Path, login: LoginNode) -> None:
    for word in WORDS:
        quoted = '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        if key == "name":
            command = [*SLURM, f"name={quoted}"]
        else:
            (folder / "cluster.yaml").write_text(CLUSTER + f"{key}: {quoted}\n")
            command = SLURM
        ended = login.run(command, folder, environment(folder))
        if key != "name" and key != "venv" and word.startswith("../"):
            assert ended.status == 0, "a word, if an odd one: Slurm will not know it"
            continue
        assert_harmless(ended, folder, what=f"{key} = {word}")


BOMBS = {
    "nested aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n"
                                                          for p, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "nested merges": "a: &a {x: 1}\n" + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{p}'] * 9)}]}}\n"
                                             for p, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias of itself": "a: &a {b: *a}",
    "deep lists": "a: " + "[" * 100_000,
    "deep sections": "".join(" " * i + f"k{i}:\n" for i in range(900)),
    "a long number": "train: {steps: " + "9" * 900_000 + "}",
    "a long key": "k" * 900_000 + ": 1",
    "many keys": "\n".join(f"k{i}: {i}" for i in range(60_000)),
    "many documents": "---\n" * 300_000,
    "a base of itself": "base: run.yaml\n" + TINY,
    "a base from a device": "base: /dev/zero\n",
    "a base from a pipe": "base: /proc/self/fd/0\n",
    "a base from the network": "base: https://example.com/x.yaml\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_eats_neither_time_nor_memory(name: str, folder: Path, login: LoginNode) -> None:
    (folder / "run.yaml").write_text(BOMBS[name])
    assert_harmless(login.run(["check", "run.yaml"], folder, environment(folder)), folder, what=name)


FED = {
    "corpus.idx is a pickle": ("corpus.idx", PICKLE),
    "tokenizer is a pickle": ("tokenizer.json", PICKLE),
    "tokenizer is deep": ("tokenizer.json", b"[" * 100_000),
    "tokenizer is a link to a device": ("tokenizer.json", None),
    "lines are a pickle": ("x.jsonl", PICKLE),
    "lines are deep": ("x.jsonl", b'{"text": ' + b"[" * 100_000),
    "lines are a zip": ("x.jsonl", b"PK\3\4" + b"../../pwned" * 9),
    "lines are a tar": ("x.jsonl", b"../../pwned\0".ljust(512, b"\0") * 3),
    "packed lines are no gzip": ("x.jsonl.gz", PICKLE),
    "parquet is a pickle": ("x.parquet", PICKLE),
    "parquet has a long footer": ("x.parquet", b"PAR1" + b"\0" * 32 + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize("name", FED)
def test_data_of_another_kind_are_refused_and_never_run(name: str, folder: Path) -> None:
    tokens(folder)
    file, content = FED[name]
    if content is None:
        (folder / file).symlink_to("/dev/zero")
    else:
        (folder / file).write_bytes(content)
    command = ["train", "run.yaml"]
    if file == "tokenizer.json":
        command.append("data.tokenizer=tokenizer.json")
    elif file.startswith("x."):
        kind = "parquet" if file.endswith("parquet") else "jsonl"
        command += [
            "data.tokens=null",
            "data.tokenizer_vocab_size=300",
            f"data.sources=[{{kind: {kind}, path: {file}}}]",
        ]
    assert_harmless(run_here(command, folder, environment(folder)), folder, what=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained") / "here"
    place.mkdir()
    (place / "run.yaml").write_text(GOOD.replace("steps: 10", "steps: 2").replace("every_steps: 5", "every_steps: 1"))
    tokens(place)
    ended = run_here(["train", "run.yaml"], place, {"TMPDIR": str(place)})
    assert ended.status == 0, ended.err
    return place


CHECKPOINT = ("COMMIT.json", "rank-00000.safetensors")


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_checkpoint_that_is_a_pickle_is_never_unpickled(name: str, trained: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    for step in RunFiles(folder / "runs" / "t").checkpoints.glob("step-*"):
        (step / name).write_bytes(PICKLE)
    for command in (["train", "run.yaml"], ["generate", "runs/t"]):
        assert_harmless(run_here(command, folder, environment(folder)), folder, what=f"{command[0]} {name}")


LINKS = (
    "config.yaml.new",
    "metrics.jsonl.new",
    "report.html.new",
)


def test_files_of_a_run_are_not_written_through_links(trained: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    victims = [folder.parent / f"victim-{name}" for name in LINKS]
    for victim, name in zip(victims, LINKS, strict=True):
        victim.write_text("precious")
        (folder / "runs" / "t" / name).unlink(missing_ok=True)
        (folder / "runs" / "t" / name).symlink_to(victim)
    ended = run_here(["train", "run.yaml", "train.steps=3"], folder, environment(folder))
    assert ended.status == 0, ended.err
    assert [victim.read_text() for victim in victims] == ["precious"] * len(victims)


def test_a_lock_that_is_a_link_is_refused(trained: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    victim = folder.parent / "victim"
    victim.write_text("precious")
    (folder / "runs" / "t" / "lease.lock").unlink(missing_ok=True)
    (folder / "runs" / "t" / "lease.lock").symlink_to(victim)
    ended = run_here(["train", "run.yaml", "train.steps=3"], folder, environment(folder))
    assert ended.status == 5 and "lease.lock cannot be written" in ended.err
    assert victim.read_text() == "precious"


def test_the_corpus_has_a_hundred_inputs() -> None:
    num_tags, num_words = len(TAGS) * len(PLACES) + len(PLACES), len(WORDS) * (1 + len(SITE))
    assert num_tags + num_words + len(BOMBS) + len(FED) + 2 * len(CHECKPOINT) + len(LINKS) >= 100
