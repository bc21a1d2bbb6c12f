"""Text from a checkpoint: the same for the same seed, whatever layout has written the checkpoint."""

from pathlib import Path

import pytest

from megagrok.train.files import RunFiles
from tests.train.commands import copy_until, run
from tests.train.conftest import Untouched


def text(files: RunFiles, *options: object, prompt: str = "def ") -> str:
    done = run("generate", files.root, "--prompt", prompt, "--max-tokens", 24, *options, folder=files.root.parents[1])
    assert done.out.startswith(prompt)
    return done.out


def test_the_same_seed_writes_the_same_text(untouched: Untouched) -> None:
    first, second, other = (text(untouched.files, "--seed", seed) for seed in (1, 1, 2))
    assert first == second != other


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(untouched: Untouched) -> None:
    assert text(untouched.files, "--temperature", 0, "--seed", 1) == text(untouched.files, "--temperature", 0)


def test_a_checkpoint_of_four_ranks_speaks_like_one_of_a_single_rank(untouched: Untouched, alone: Untouched) -> None:
    for prompt in ("def ", "import os", "", "x" * 400):
        assert text(untouched.files, "--temperature", 0, prompt=prompt) == text(
            alone.files, "--temperature", 0, prompt=prompt
        )


def test_an_earlier_checkpoint_can_be_asked_for(untouched: Untouched, tmp_path: Path) -> None:
    earlier = copy_until(untouched.files, 4, tmp_path)
    expected = text(earlier, "--seed", 3)
    assert text(untouched.files, "--seed", 3, "--step", 4) == expected != text(untouched.files, "--seed", 3)
    done = run("generate", earlier.root, "--step", 6, folder=tmp_path, status=4)
    assert "has no checkpoint of step 6; it has 4, 2\n" in done.err


def test_a_run_without_a_tokenizer_or_a_checkpoint_says_so(untouched: Untouched, tmp_path: Path) -> None:
    mute = copy_until(untouched.files, 4, tmp_path)
    mute.tokenizer.unlink()
    done = run("generate", mute.root, folder=tmp_path, status=3)
    assert done.err == (
        f"DataError: {mute.tokenizer} is missing: the run had ready-made tokens. Copy their tokenizer there.\n"
    )
    done = run("generate", "nowhere", folder=tmp_path, status=4)
    assert done.err == "CheckpointError: nowhere/checkpoints has no checkpoint yet\n"


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--temperature", "nan"), ("--max-tokens", "0")])
def test_options_that_make_no_sense_are_refused(untouched: Untouched, option: tuple[str, str]) -> None:
    run("generate", untouched.files.root, "=".join(option), folder=untouched.files.root.parents[1], status=2)
