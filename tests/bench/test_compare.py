"""The race runs every peer on one and the same model, and refuses or leaves out what it could not compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tolerance

from megagrok.bench.peers import OURS, PEERS

ROOT = Path(__file__).parents[2]
DATA_PARALLEL = ["parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1", "parallel.data=2"]
# Every size small; the stock router renormalizes and has neither soft-cap nor z-loss.
TINY_AND_ALIKE = [
    "model.vocab_size=512",
    "model.hidden=64",
    "model.num_heads=4",
    "model.head_dim=16",
    "model.moe.num_experts=4",
    "model.moe.ffn_hidden=96",
    "model.moe.router_softcap=null",
    "model.moe.renormalize_top_k=true",
    "model.moe.z_loss_coefficient=0",
    "model.moe.balance_coefficient=0",
    "train.seq_len=32",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.evaluate_samples=4",
    "data.tokenizer_vocab_size=512",
]

pytestmark = pytest.mark.slow


def race(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megagrok", "bench", "compare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one round, experts over two data ranks."""
    out = tmp_path_factory.mktemp("bench") / "compare.json"
    done = race("configs/run/quickstart.yaml", *TINY_AND_ALIKE, *DATA_PARALLEL, "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {peer.title} |" in page for peer in PEERS.values())
    return json.loads(out.read_text(encoding="utf-8"))


def contender(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in record["contenders"] if one["name"] == PEERS[name].title)


def test_every_contender_has_a_speed_and_a_ratio_to_megagrok(record: dict[str, Any]) -> None:
    assert [one["name"] for one in record["contenders"]] == [peer.title for peer in PEERS.values()]
    assert record["absent"] == []
    for one in record["contenders"]:
        for spread in ("tokens_per_second", "ratio", "cpu_seconds_per_step", "cpu_ratio"):
            measured = one[spread]
            assert 0 < measured["min"] <= measured["median"] <= measured["max"]
        assert 0 < one["mfu"] < 1.5
    assert record["contenders"][0]["ratio"]["median"] == 1


def test_the_stock_layer_computes_what_megagroks_layer_computes(record: dict[str, Any]) -> None:
    """After three updates still: forward, gradients and the way through the optimizer are those of the same model."""
    ours, stock = contender(record, OURS), contender(record, "stock")
    assert stock["params"] == ours["params"]
    assert abs(stock["last_loss"] - ours["last_loss"]) < tolerance.LAYOUT_LOSS


def test_auto_ep_computes_what_ddp_computes(record: dict[str, Any]) -> None:
    """Up to the optimizer's order of sums: the same first values, no charge on either router, the same batches."""
    ddp, auto_ep = contender(record, "ddp"), contender(record, "autoep")
    assert abs(auto_ep["first_loss"] - ddp["first_loss"]) < 1e-3
    assert abs(auto_ep["last_loss"] - ddp["last_loss"]) < 1e-3


@pytest.mark.parametrize("name", ["megatron", "ddp", "autoep"])
def test_peers_have_the_same_size_but_for_half_the_norms(record: dict[str, Any], name: str) -> None:
    # Two norms of the width 64 less in each of four layers.
    assert contender(record, OURS)["params"] - contender(record, name)["params"] == 2 * 64 * 4


def test_a_peer_that_cannot_take_part_has_a_row_that_says_why(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    arguments = ["--peers", "megatron", "ddp", "autoep", "--rounds", "1", "--json", str(out)]
    done = race("configs/run/quickstart.yaml", *TINY_AND_ALIKE, *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in record["absent"]] == [PEERS["ddp"].title, PEERS["autoep"].title]
    assert all("tensor or pipeline ranks" in row["reason"] for row in record["absent"])


def test_what_a_peer_cannot_do_is_refused_before_anything_starts() -> None:
    done = race("configs/run/quickstart.yaml", "model.tied_embeddings=true")
    assert done.returncode == 2
    assert "model.tied_embeddings" in done.stderr
