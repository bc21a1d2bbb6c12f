"""`megagrok rehearse` refuses what it cannot walk, before a process group exists, and says all it found as JSON."""

import json
from pathlib import Path

import pytest

from megagrok.cli import main

RUN = str(Path(__file__).parents[2] / "configs/run/pretrain-286b.yaml")
TINY = str(Path(__file__).parents[2] / "configs/run/tiny.yaml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([RUN, "--world", "1024"], "world = 1024 ranks, parallel.tensor * context * pipeline * data = 512"),
        ([RUN, "--rank", "512"], "rank 512 is outside 0 .. 511"),
        ([RUN, "--rank", "-1"], "rank -1 is outside 0 .. 511"),
        ([RUN, "parallel.expert=3"], "parallel.expert"),
        ([RUN, "--load", "0.9"], "--load 0.9, needs a share between 0.125"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(arguments: list[str], said: str, capsys) -> None:
    assert main(["rehearse", *arguments]) in (2, 3)
    assert said in capsys.readouterr().err


def test_everything_is_said_as_json_too(capsys) -> None:
    assert main(["rehearse", TINY, "--world", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forward_backward"]["weights"] > 0 and found["flops"] and found["shapes"] and found["replaced"]
    assert all(row["holds"] for row in found["plan"])


def test_a_given_load_is_not_held_against_a_balanced_plan(capsys) -> None:
    assert main(["rehearse", TINY, "--load", "0.5"]) == 0
    assert "0.5 of all choices to one expert of this rank" in (said := capsys.readouterr().out)
    assert "those of balanced routing" in said
