"""From options to a run: a number of ranks means data ranks, and what cannot be is refused with what can."""

from pathlib import Path

import pytest

from megagrok.bench.command import Subject, compare
from megagrok.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/run/tiny.yaml"


def test_a_number_of_ranks_is_met_by_data_ranks() -> None:
    subject = Subject(config=TINY, overrides=["parallel.pipeline=2"], world=4)
    assert subject.load().parallel.data == 2
    assert "configs/run/tiny.yaml parallel.pipeline=2 parallel.data=2" in subject.command("bench")


def test_a_number_of_ranks_that_makes_no_whole_copies_of_the_model_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"--world 5 does not divide .* of 2 ranks .*Fix: --world 4"):
        Subject(config=TINY, overrides=["parallel.pipeline=2"], world=5).load()


def test_a_peer_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="no peer picotron; there are: megatron, ddp, autoep, stock"):
        compare(Subject(config=TINY, overrides=[]), ["picotron"], 1, None)
