"""One run that nobody disturbs, made once and held against all others; and the configuration they share."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megagrok.train.files import RunFiles
from tests.train.commands import Done, run

CONFIGS = Path(__file__).parents[2] / "configs"
# Small, and with everything that a resumed run could get wrong: a batch that grows between two saves, a balance loss
# over the previous step, dropout, experts on tensor ranks, sharded moments. eps as in tests/tolerance.py.
SETTINGS = """
base: {configs}/run/tiny.yaml
name: law
model:
  num_layers: 2
  dropout: 0.1
train:
  steps: 8
  seq_len: 16
  global_batch: 4
  batch_ramp:
    - until_samples: 9
      global_batch: 2
  evaluate_every_steps: 2
  evaluate_samples: 4
optimizer:
  lr: 1.0e-2
  eps: 1.0e-5
data:
  cache: {cache}
  sources:
    - kind: python_stdlib
      max_bytes: 200_000
  held_out_fraction: 0.1
checkpoint:
  every_steps: 2
  keep: 9
telemetry:
  wandb: "off"
"""
FOUR_RANKS = ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=2")


@dataclass(frozen=True, slots=True)
class Untouched:
    """A run of eight steps that nothing happened to."""

    files: RunFiles
    done: Done


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file; one rank unless settings say more."""
    folder = tmp_path_factory.mktemp("config")
    path = folder / "law.yaml"
    path.write_text(SETTINGS.format(configs=CONFIGS, cache=folder / "cache"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def untouched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    """On four ranks. Read it, copy it, leave it as it is."""
    folder = tmp_path_factory.mktemp("untouched")
    done = run("train", config, *FOUR_RANKS, folder=folder)
    return Untouched(RunFiles(folder / "runs" / "law"), done)


@pytest.fixture(scope="session")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    """The same eight steps on one rank, with W&B, in a folder whose name a shell would split."""
    folder = tmp_path_factory.mktemp("alone")
    done = run("train", config, "runs_dir=my runs", "telemetry.wandb=offline", folder=folder)
    return Untouched(RunFiles(folder / "my runs" / "law"), done)
