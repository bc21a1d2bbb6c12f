"""Every file in configs/ resolves to what tests/golden says: a refactor that changes a run shows as a diff.

`pytest tests/config --update-golden` rewrites the golden files.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from megagrok.config import from_dict, load_config, load_model_config, to_dict
from megagrok.slurm.cluster import load_cluster

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def resolved(path: Path) -> str:
    if path.parent.name == "model":
        plain = {"model": dataclasses.asdict(load_model_config(path))}
    elif path.parent.name == "cluster":
        plain = dataclasses.asdict(load_cluster(path))
    else:
        plain = to_dict(load_config(path).config)
    return json.dumps(plain, indent=2) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_file_resolves_to_its_golden_resolution(path: Path, update_golden: bool) -> None:
    golden = ROOT / "tests" / "golden" / path.parent.name / f"{path.stem}.json"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(resolved(path))
    assert resolved(path) == golden.read_text(), "changed on purpose? pytest tests/config --update-golden"


def test_no_golden_file_outlives_its_configuration() -> None:
    folders = [ROOT / "tests" / "golden" / kind for kind in ("model", "cluster", "run")]
    golden = {f"{path.parent.name}/{path.stem}" for folder in folders for path in folder.glob("*.json")}
    assert golden == {f"{path.parent.name}/{path.stem}" for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_file_begins_by_saying_who_should_use_it(path: Path) -> None:
    first = path.read_text().split("\n\n")[0]
    assert first.startswith("# ")
    assert any(word in first for word in ("For ", "for ", "runs")), first


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_run_survives_json(path: Path) -> None:
    config = load_config(path).config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
