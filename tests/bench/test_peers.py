"""What is known of a peer without importing it."""

from dataclasses import replace
from pathlib import Path

from megagrok.bench.choices import PEER_NAMES
from megagrok.bench.peers import OURS, PEERS
from megagrok.config import decode_config

RUN = decode_config(Path(__file__).parents[2] / "configs/run/tiny.yaml", []).config


def test_the_command_line_offers_every_peer() -> None:
    assert (OURS, *PEER_NAMES) == tuple(PEERS)


def test_a_peer_that_is_not_installed_says_so() -> None:
    absent = replace(PEERS["ddp"], libraries=("no_such_library",))
    assert absent.why_not(RUN) == "not installed: no_such_library"


def test_ours_can_always_take_part() -> None:
    assert PEERS[OURS].why_not(RUN) is None
