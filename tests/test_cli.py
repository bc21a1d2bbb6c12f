"""The command: what it prints, where, and with which exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagrok.cli import COMMANDS, main
from megagrok.errors import EXIT_UNREAD

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = str(CONFIGS / "run" / "tiny.yaml")
QUICK = str(CONFIGS / "run" / "quickstart.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_passes_its_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path)]) == 0
    assert f"{path}: ok. {path.stem}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--world", "8", "parallel.data=2", "train.global_batch=16"],
        ["parallel.data=2", "train.global_batch=16", "--world", "8"],
        ["parallel.data=2", "--world=8", "train.global_batch=16"],
    ],
)
def test_settings_stand_before_or_after_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICK, *arguments]) == 0
    assert "8 ranks" in capsys.readouterr().out


def test_a_refused_run_exits_2_with_all_its_problems_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICK, "--world", "6", "parallel.expert=4", "optimizer.lr=-1.0"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ConfigError: 3 problems in quickstart:\n")
    assert len(err.splitlines()) == 4
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TINY, "optimizer.lr=-1.0", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_command_runs_as_a_module_with_its_exit_status() -> None:
    command = [sys.executable, "-m", "megagrok", "check", TINY, "train.steps=3e-4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, check=False)
    assert done.returncode == 2
    assert done.stderr == "ConfigError: train.steps = '3e-4' (text), needs an integer (override)\n"


def test_a_model_is_described_in_a_table_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "model" / "grok2-286b.yaml")
    assert main(["describe", path]) == 0
    table = capsys.readouterr().out
    assert "285,621,624,832" in table
    assert "causal half" in table
    assert main(["describe", path, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["active_params"] == 80_268_500_992
    assert sum(plain["parts"].values()) == plain["total_params"]
    assert plain["weight_bytes_bf16"] == 2 * plain["total_params"]


def test_a_run_is_described_with_its_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", QUICK, "--json", "train.steps=100"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["world_size"] == 4
    assert plain["total_tokens"] == 100 * plain["tokens_per_step"]
    assert len(plain["rank_bytes"]) == 2


def test_a_setting_is_explained_with_and_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "parallel.tensor"]) == 0
    assert "Ranks that split each weight matrix" in capsys.readouterr().out
    assert main(["explain", "parallel.tensor", QUICK]) == 0
    assert f"parallel.tensor = 2  ({QUICK}:" in capsys.readouterr().out
    assert main(["explain", "parallel.tensr"]) == 2
    assert "Did you mean parallel.tensor?" in capsys.readouterr().err


def test_help_lists_every_command_and_an_unknown_one_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[name].help in " ".join(capsys.readouterr().out.split())


def test_a_reader_that_has_seen_enough_is_no_bug() -> None:
    command = [sys.executable, "-m", "megagrok", "explain", "--all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(timeout=30) == EXIT_UNREAD
    assert told == b""
