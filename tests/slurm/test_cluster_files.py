"""A site's file is decoded as strictly as a run's."""

from pathlib import Path

import pytest

from megagrok.errors import ConfigError
from megagrok.slurm.cluster import load_cluster
from tests.slurm.conftest import CLUSTER, CONFIGS


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_cluster_file_is_read_and_says_for_whom_it_is(path: Path) -> None:
    assert load_cluster(path).walltime_seconds >= 3600
    assert path.read_text(encoding="utf-8").startswith("# For ")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("walltime: 24:00:00", "YAML 1.1 reads it in base 60"),
        ('walltime: "1 day"', "walltime = '1 day', needs D-HH:MM:SS or HH:MM:SS"),
        ('walltime: "00:01:00"', "needs more than signal_lead_seconds"),
        ("signal_lead_seconds: 10", "signal_lead_seconds = 10, needs >= 30"),
        ("spare_nodes: -1", "spare_nodes = -1, needs >= 0"),
        ("ranks_per_node: null", "how many ranks has a full node"),
        ("venv: envs/megagrok", "needs an absolute path"),
        ("environment: {lower: x}", "'lower' is no name of a variable"),
        ("environment: {NCCL_X: [1]}", "environment.0.value is a list"),
        ("environment: NCCL_X", "environment is 'NCCL_X' (text), needs NAME: value lines"),
        ("preflight: {max_skew_seconds: .nan}", "needs a finite number"),
        ("partitoin: gpu", "Did you mean 'partition'"),
        ("data: {}", "unknown key 'data' in the top level. Known: "),
        ("container: {image: '-x'}", "begins with a dash"),
        ("container: {}", "container.image is missing"),
        ("partition: hf_abcdefghijklmnopqrstuvwxyz", "partition looks like a secret"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(line: str, text: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    kept = [each for each in CLUSTER.splitlines() if each.partition(":")[0] != key]
    if key == "preflight":
        kept = [each for each in kept if not each.startswith("  ")]
    path = tmp_path / "cluster.yaml"
    path.write_text("\n".join([*kept, line]) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_cluster(path)
    assert text in str(refused.value)
    assert f"{path}:" in str(refused.value) or "null" in line


def test_variables_are_text_whatever_yaml_makes_of_them(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER + "environment: {NCCL_DEBUG: WARN, A: 1, B: no, C: true, D: 0x10}\n", encoding="utf-8")
    found = {variable.name: variable.value for variable in load_cluster(path).environment}
    assert found == {"NCCL_DEBUG": "WARN", "A": "1", "B": "no", "C": "true", "D": "0x10"}
