"""The benchmark of saves runs, verifies what megagrok saved, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_a_small_race_writes_its_numbers_and_its_page(tmp_path: Path) -> None:
    folder, out = tmp_path / "disk", tmp_path / "out" / "checkpoint.json"
    folder.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint.py"), "--megabytes", "8", "--rounds", "2"]
    command += ["--folder", str(folder), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [entry["name"].replace(",", "").split(" ")[0] for entry in record["contenders"]] == ["megagrok"] * 2 + [
        "DCP"
    ] * 3
    for entry in record["contenders"]:
        assert len(entry["rounds"]) == 2
        assert all(0 < save["stall_seconds"] <= save["total_seconds"] for save in entry["rounds"])
    assert record["contenders"][0]["stall_ratio"]["median"] == 1.0
    assert out.with_suffix(".md").read_text().count("\n| DCP") == 3
    assert not list(folder.iterdir())
