"""What a site is like: one small YAML file per cluster, decoded as strictly as a run's configuration.

Not what is trained, and no code: paths, names and numbers. Every text is a word (words.py), because it ends up in a
job script or beside srun.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megagrok.config.checks import path_problem
from megagrok.config.decode import Decoder
from megagrok.config.problems import Problem, placed, raise_problems
from megagrok.config.source import Entry, Listing, Scalar, Section, kind_of, read_file
from megagrok.slurm.words import image_problem, variable_problem, word_problem

_WALLTIME = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d):([0-5]\d)")
# Slurm looks at time limits every half minute; less would be no warning at all.
LEAST_SIGNAL_LEAD_SECONDS = 30
_LEAST = {"gpus_per_node": 0, "spare_nodes": 0, "max_restarts": 0, "signal_lead_seconds": LEAST_SIGNAL_LEAD_SECONDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class MountConfig:
    """A folder that ranks in a container see."""

    source: str
    """Path on the nodes."""
    target: str
    """Path in the container."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerConfig:
    """Where ranks run, if not on the host: pyxis and enroot."""

    image: str
    """Image as pyxis takes it: a .sqsh file, or REGISTRY#IMAGE:TAG."""
    python: str = "python3"
    """Python inside, with megagrok installed."""
    mounts: tuple[MountConfig, ...] = ()
    """Folders that it sees; runs, data and configurations have to be among them, under their own names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightConfig:
    """What every node has to show before ranks are started."""

    timeout_seconds: int = 180
    """A node that has not answered by then is left out."""
    max_skew_seconds: float = 2.0
    """Largest difference between a node's clock and the supervisor's."""
    min_open_files: int = 4096
    """Least `ulimit -n`."""
    min_shm_bytes: int = 1 << 30
    """Least size of /dev/shm; NCCL and data workers live there."""
    min_bandwidth_gb_per_second: float = 0.0
    """Least all-reduce bus bandwidth over all nodes; 0 does not measure (it imports torch, which takes seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """An environment variable of the ranks."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """One cluster, for one kind of job."""

    partition: str | None = None
    """Partition; null is the cluster's default. So with the names below it."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Feature that nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: str | None = None
    """Nodes never to use, as in node07,node31."""
    mail_user: str | None = None
    """Who hears of failures and requeues."""
    walltime: str
    """Time limit of one job, D-HH:MM:SS in quotes; a run goes on in as many jobs as it takes."""
    gpus_per_node: int
    """GPUs that a node has; 0 for a cluster without."""
    ranks_per_node: int | None = None
    """Ranks on a full node; null is one for each GPU."""
    exclusive: bool = True
    """Whole nodes, all of their memory."""
    spare_nodes: int = 0
    """Nodes allocated besides, so that a failed one is replaced without going back to the queue."""
    max_restarts: int = 10
    """Restarts after failures, over all jobs of a submission; preemptions and time limits do not count."""
    signal_lead_seconds: int = 300
    """How long before the time limit a run is asked to save; longer than its slowest save."""
    venv: str | None = None
    """Folder with bin/python on every node, megagrok installed; null is the Python that submits."""
    container: ContainerConfig | None = None
    """Container of the ranks; null runs them on the host."""
    environment: tuple[Variable, ...] = ()
    """Variables of the ranks, as NAME: value lines: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, FI_PROVIDER, ..."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """What every node has to show before ranks are started."""

    @property
    def full_node(self) -> int:
        """Ranks on a full node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def walltime_seconds(self) -> int:
        """The time limit in seconds."""
        match = _WALLTIME.fullmatch(self.walltime)
        assert match is not None, "checked when it was loaded"
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def load_cluster(path: Path) -> ClusterConfig:
    """The cluster that a file describes. Raises ConfigError that lists all problems."""
    problems: list[Problem] = []
    if (wrong := path_problem("cluster file", str(path))) is not None:
        problems.append(Problem("", wrong))
        raise_problems(problems, "the cluster file")
    tree = read_file(path, problems)
    # Not those of a run: nothing of a cluster file has its place there.
    decoder = Decoder(problems, homes=lambda name: [])
    cluster = None
    if tree is not None:
        cluster = decoder.decode(_with_listed_environment(tree, problems), ClusterConfig)
    if cluster is not None:
        problems += placed(cluster_problems(cluster), decoder.provenance)
    raise_problems(problems, str(path))
    assert cluster is not None, "decoding failed without a problem"
    return cluster


def cluster_problems(cluster: ClusterConfig) -> list[Problem]:
    """Everything about the values of a cluster file that cannot be."""
    problems = list(_values(cluster, ""))
    if not _WALLTIME.fullmatch(cluster.walltime):
        text = f"walltime = {cluster.walltime!r}, needs D-HH:MM:SS or HH:MM:SS, in quotes"
        problems.append(Problem("walltime", text))
    elif cluster.walltime_seconds <= cluster.signal_lead_seconds:
        lead = cluster.signal_lead_seconds
        text = f"walltime = {cluster.walltime}, needs more than signal_lead_seconds ({lead}), or nothing is trained"
        problems.append(Problem("walltime", text))
    if cluster.full_node < 1:
        text = "ranks_per_node is null and gpus_per_node = 0, needs one of them: how many ranks has a full node?"
        problems.append(Problem("ranks_per_node", text))
    if cluster.venv is not None and not cluster.venv.startswith("/"):
        problems.append(
            Problem("venv", f"venv = {cluster.venv!r}, needs an absolute path: nodes have no common folder")
        )
    return problems


def _values(section: object, prefix: str) -> Iterator[Problem]:
    assert dataclasses.is_dataclass(section) and not isinstance(section, type)
    for each in dataclasses.fields(section):
        key, value = f"{prefix}{each.name}", getattr(section, each.name)
        match value:
            case None | bool():
                continue
            case str() if each.name != "walltime":
                wrong = image_problem(key, value) if each.name == "image" else word_problem(key, value)
                if wrong is not None:
                    yield Problem(key, wrong)
            case int() if value < (least := _LEAST.get(each.name, 1)):
                yield Problem(key, f"{key} = {value}, needs >= {least}")
            case float() if not (math.isfinite(value) and value >= 0):
                yield Problem(key, f"{key} = {value}, needs a finite number >= 0")
            case tuple():
                for number, item in enumerate(value):
                    if isinstance(item, Variable):
                        if (wrong := variable_problem(key, item.name, item.value)) is not None:
                            yield Problem(f"{key}.{number}.value", wrong)
                    else:
                        yield from _values(item, f"{key}.{number}.")
            case ContainerConfig() | PreflightConfig():
                yield from _values(value, f"{key}.")


def _with_listed_environment(tree: Section, problems: list[Problem]) -> Section:
    """NAME: value lines as the list of variables that the decoder reads."""
    entry = tree.entries.get("environment")
    if entry is None:
        return tree
    if not isinstance(entry.node, Section):
        text = f"environment is {kind_of(entry.node)}, needs NAME: value lines"
        problems.append(Problem("environment", text, (), entry.place))
        return Section({name: each for name, each in tree.entries.items() if name != "environment"}, tree.place)
    items = []
    for name, each in entry.node.entries.items():
        # 1 and true are text to a process. Surprises of YAML (no, 0x1) keep their text too: nothing converts them here.
        value = each.node
        if isinstance(value, Scalar) and value.value is not None:
            value = Scalar(value.text, value.text, value.place)
        fields = {"name": Entry(Scalar(name, name, each.place), each.place), "value": Entry(value, each.place)}
        items.append(Section(fields, each.place))
    listing = Entry(Listing(tuple(items), entry.place), entry.place)
    return Section({**tree.entries, "environment": listing}, tree.place)
