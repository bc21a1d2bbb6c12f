"""The job script of a run: directives, and one command that starts the supervisor. Everything in it is resolved.

Not the decisions that are taken in the job (supervise.py). The one idea: a script that decides nothing has no bugs of
its own; it is shown before it is submitted, kept in the run's folder, and submitted again unchanged.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrok.config import Loaded, RunConfig, decode_config
from megagrok.config.problems import Problem
from megagrok.plan import world_size
from megagrok.slurm.cluster import ClusterConfig, load_cluster
from megagrok.slurm.words import word_problem
from megagrok.train.files import RunFiles


@dataclass(frozen=True, slots=True)
class Submission:
    """What was asked for: a run, a cluster, and where the command was typed. Nothing is created by asking."""

    loaded: Loaded
    config_path: Path
    overrides: tuple[str, ...]
    cluster: ClusterConfig
    cluster_path: Path
    folder: Path
    """Absolute: where the run's relative paths begin."""

    @property
    def run(self) -> RunConfig:
        """The configuration of the run."""
        return self.loaded.config

    @property
    def files(self) -> RunFiles:
        """The folder of the run, absolute."""
        return RunFiles(self.folder / self.run.runs_dir / self.run.name)

    @property
    def ranks(self) -> int:
        """Processes of the run, over all nodes."""
        return world_size(self.run.parallel)

    @property
    def nodes(self) -> int:
        """Nodes that the run needs, without spares."""
        return max(1, -(-self.ranks // self.cluster.full_node))

    @property
    def script(self) -> Path:
        """Where the script is kept."""
        return self.files.root / "job.sbatch"

    @property
    def python(self) -> str:
        """Python on the hosts."""
        return sys.executable if self.cluster.venv is None else f"{self.cluster.venv}/bin/python"

    @property
    def rank_python(self) -> str:
        """Python of the ranks, which may be in a container."""
        return self.python if self.cluster.container is None else self.cluster.container.python

    @property
    def train_arguments(self) -> list[str]:
        """CONFIG [key=value...], independent of where it is typed."""
        return [str(self.folder / self.config_path), *self.overrides]


def read_submission(config: Path, overrides: Sequence[str], cluster: Path) -> Submission:
    """The submission of a run on a cluster. Raises ConfigError for a file that cannot be read or decoded."""
    folder = Path.cwd()
    return Submission(
        decode_config(config, overrides), config, tuple(overrides), load_cluster(cluster), folder / cluster, folder
    )


def word_problems(submission: Submission) -> list[Problem]:
    """Everything that would stand in the script and is no word."""
    words = [("configuration file", str(submission.folder / submission.config_path))]
    words += [("cluster file", str(submission.cluster_path)), ("current folder", str(submission.folder))]
    words += [("folder of the run", str(submission.files.root)), ("Python", submission.python)]
    words += [("setting", override) for override in submission.overrides]
    found = (word_problem(what, value) for what, value in words)
    return [Problem("", text) for text in found if text is not None]


def render(submission: Submission) -> str:
    """The script. Call `word_problems` first: what is no word is a bug here."""
    cluster, files = submission.cluster, submission.files
    total = submission.nodes + cluster.spare_nodes
    spare = f", and {cluster.spare_nodes} spare" if cluster.spare_nodes else ""
    options = {
        "job-name": f"megagrok-{submission.run.name}",
        "comment": str(files.root),
        "chdir": str(submission.folder),
        "nodes": total,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "time": cluster.walltime,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": cluster.exclude,
        "mail-user": cluster.mail_user,
        "mail-type": "FAIL,REQUEUE,TIME_LIMIT" if cluster.mail_user else None,
        "output": f"{files.root}/logs/job-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.signal_lead_seconds}",
    }
    flags = ["requeue", *(["exclusive", "mem=0"] if cluster.exclusive else [])]
    # A lost node must not end the job while a spare stands by; without spares it should, and Slurm requeues it.
    flags += ["no-kill"] if cluster.spare_nodes else []
    directives = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    directives += [f"#SBATCH --{flag}" for flag in flags]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {submission.run.name}: {submission.ranks} ranks on {submission.nodes} nodes{spare}.",
            "# Written by megagrok slurm: change the cluster file or the configuration, and submit again.",
            *directives,
            "set -eu",
            f"exec {shlex.join(supervise_command(submission))}",
            "",
        ]
    )


def supervise_command(submission: Submission) -> list[str]:
    """What the script becomes: it takes the shell's place, so that Slurm's warnings reach it."""
    return [
        submission.python, "-u", "-m", "megagrok", "slurm", "supervise", *submission.train_arguments,
        "--cluster", str(submission.cluster_path),
    ]  # fmt: skip
