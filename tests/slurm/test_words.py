"""Text that reaches Slurm is a word, or it is refused before anything exists."""

from pathlib import Path

import pytest

from megagrok.cli import main
from megagrok.config.problems import Problem
from megagrok.errors import ConfigError
from megagrok.slurm.cluster import load_cluster
from megagrok.slurm.words import variable_problem, word_problem
from tests.slurm.conftest import CLUSTER, Desk

HOSTILE = [
    '"; touch pwned; "', "$(touch pwned)", "`touch pwned`", "a b", "a'b", 'a"b', "a;b", "a|b", "a&b", "a>b", "a\\b",
    "x\n#SBATCH --wrap=id", "x\r", "x\0", "", "-N9", "--wrap=id", "é", "a" * 257, "$HOME", "~", "a*", "{a,b}",
    "!x", "a\tb",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_what_a_shell_or_slurm_would_read_as_more_than_a_word_is_none(text: str) -> None:
    assert word_problem("partition", text)
    assert variable_problem("environment", "NCCL_IB_HCA", text)


@pytest.mark.parametrize("text", ["gpu", "node07,node31", "1-00:00:00", "/a/b.c", "mlx5_0:1,mlx5_1", "a=b", "50%"])
def test_the_words_that_sites_use_are_words(text: str) -> None:
    assert word_problem("x", text) is None


@pytest.mark.parametrize(
    "name", ["path", "A B", "A;B", "", "1A", "SLURM_JOB_ID", "MASTER_ADDR", "LD_PRELOAD", "WANDB_API_KEY", "HF_TOKEN"]
)
def test_a_cluster_file_sets_no_such_variable(name: str) -> None:
    assert variable_problem("environment", name, "x")


def test_a_secret_is_refused_and_not_repeated(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{CLUSTER}account: '{key}'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="account looks like a secret") as refused:
        load_cluster(path)
    assert key not in str(refused.value)


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\0" not in text], ids=repr)
@pytest.mark.parametrize("where", ["partition", "folder"])
@pytest.mark.fault("F36")
def test_hostile_text_creates_nothing(
    where: str, text: str, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk.folder)
    overrides = []
    if where == "partition":
        quoted = (
            text.replace("\\", "\\\\")
            .replace('"', '\\"')
            .replace("\n", "\\n")
            .replace("\r", "\\r")
            .replace("\t", "\\t")
        )
        desk.cluster.write_text(f'{CLUSTER}partition: "{quoted}"\n', encoding="utf-8")
    elif text.startswith("-"):
        pytest.skip("behind runs_dir= and below a folder, a dash begins no option")
    else:
        overrides = ["runs_dir=" + text]
    before = sorted(desk.folder.rglob("*"))
    assert main(["slurm", "submit", str(desk.config), *overrides, "--cluster", str(desk.cluster)]) == 2
    assert sorted(desk.folder.rglob("*")) == before
    assert "ConfigError" in capsys.readouterr().err


def test_a_problem_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER + "partition: 'a b'\nspare_nodes_: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key 'spare_nodes_' in the top level. Did you mean 'spare_nodes'"):
        load_cluster(path)
    assert str(Problem("a", "b", (), "c:1")) == "b (c:1)"
