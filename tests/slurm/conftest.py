"""One cluster for all tests of a session, and what a person who uses it has: a folder, a run, a cluster file."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

CONFIGS = Path(__file__).parents[2] / "configs"
CLUSTER = """
walltime: "00:10:00"
gpus_per_node: 0
ranks_per_node: 2
spare_nodes: 1
signal_lead_seconds: 60
preflight:
  min_shm_bytes: 1_048_576
  min_open_files: 256
"""


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """The cluster itself. Use `cluster`."""
    if (lacking := missing()) is not None:
        pytest.skip(lacking)
    # Short: munge's socket has a path of at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle."""
    yield session_cluster
    session_cluster.clear()


@dataclass(frozen=True, slots=True)
class Desk:
    """A folder on the shared file system, and the files in it."""

    folder: Path
    config: Path
    cluster: Path


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A small run of four ranks, two to a node, on a cluster file with a spare node."""
    config, cluster = tmp_path / "run.yaml", tmp_path / "cluster.yaml"
    config.write_text(f"base: {CONFIGS}/run/tiny.yaml\nname: law\nparallel:\n  data: 4\n", encoding="utf-8")
    cluster.write_text(CLUSTER, encoding="utf-8")
    return Desk(tmp_path, config, cluster)
