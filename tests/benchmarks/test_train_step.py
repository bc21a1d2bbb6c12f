"""The benchmark of the training step runs, races one and the same model, and refuses what it could not compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tolerance

ROOT = Path(__file__).parents[2]
NAMES = ["megagrok", "megatron-core GPTModel", "deepspeed stock MoE"]
# The quick start's layout, every size small; the stock router renormalizes and has neither soft-cap nor z-loss.
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
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one round."""
    out = tmp_path_factory.mktemp("bench") / "train_step.json"
    done = race("configs/run/quickstart.yaml", *TINY_AND_ALIKE, "--repeats", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in NAMES)
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_contender_has_a_speed_and_a_ratio_to_megagrok(record: dict[str, Any]) -> None:
    assert [contender["name"] for contender in record["contenders"]] == NAMES
    for contender in record["contenders"]:
        for spread in ("tokens_per_second", "ratio", "cpu_seconds_per_step", "cpu_ratio"):
            measured = contender[spread]
            assert 0 < measured["min"] <= measured["median"] <= measured["max"]
    assert record["contenders"][0]["ratio"]["median"] == 1


def test_the_stock_layer_computes_what_megagroks_layer_computes(record: dict[str, Any]) -> None:
    """After three updates still: forward, gradients and the way through the optimizer are those of the same model."""
    ours, _, stock = record["contenders"]
    assert stock["params"] == ours["params"]
    assert abs(stock["last_loss"] - ours["last_loss"]) < tolerance.LAYOUT_LOSS


def test_megatrons_model_has_the_same_size(record: dict[str, Any]) -> None:
    ours, megatron, _ = record["contenders"]
    # Two norms of the width 64 less in each of four layers.
    assert ours["params"] - megatron["params"] == 2 * 64 * 4


def test_what_a_peer_cannot_do_is_refused_before_anything_starts() -> None:
    done = race("configs/run/quickstart.yaml", "model.tied_embeddings=true")
    assert done.returncode == 2
    assert "model.tied_embeddings" in done.stderr
