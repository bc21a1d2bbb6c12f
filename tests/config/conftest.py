"""Options and files that the tests of the configuration share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from configs/")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden", default=False))


@pytest.fixture
def tiny_path() -> Path:
    return ROOT / "configs" / "run" / "tiny.yaml"


@pytest.fixture
def tiny_text() -> str:
    """A whole run in one file, one setting a line."""
    return TINY


TINY = """\
name: t
model:
  vocab_size: 512
  hidden: 64
  num_layers: 4
  num_heads: 4
  num_kv_heads: 2
  head_dim: 16
  max_positions: 128
  moe:
    num_experts: 4
    top_k: 2
    ffn_hidden: 96
train:
  steps: 10
  seq_len: 32
  global_batch: 8
  micro_batch: 1
  evaluate_every_steps: 5
  evaluate_samples: 8
optimizer:
  lr: 1.0e-2
checkpoint:
  every_steps: 5
data:
  tokens: corpus
"""
