"""What Slurm tells a job about itself: the only file of this room that reads the process environment.

Not the placement of ranks (megagrok/parallel). Everything is read when asked, so a test can hand in what it likes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrok.errors import ConfigError, MachineError

CLUSTER_VARIABLE = "MEGAGROK_CLUSTER"


@dataclass(frozen=True, slots=True)
class Job:
    """The job that this process runs in. `restart` counts from 0; `node_list` is folded, as in node[1-3]."""

    id: int
    restart: int
    num_nodes: int
    node_list: str
    is_array: bool


def environment() -> Mapping[str, str]:
    """The variables of this process: what a started program is to inherit."""
    return os.environ


def this_job(variables: Mapping[str, str] = os.environ) -> Job:
    """The job. Raises MachineError outside of one."""
    try:
        return Job(
            id=int(variables["SLURM_JOB_ID"]),
            # Unset, not 0, the first time.
            restart=int(variables.get("SLURM_RESTART_COUNT", 0)),
            num_nodes=int(variables["SLURM_JOB_NUM_NODES"]),
            node_list=variables["SLURM_JOB_NODELIST"],
            is_array="SLURM_ARRAY_JOB_ID" in variables,
        )
    except (KeyError, ValueError) as error:
        raise MachineError(
            f"this process is not in a Slurm batch job ({error}). Submit one: megagrok slurm submit CONFIG, "
            "or sbatch launch/train.sbatch CONFIG"
        ) from error


def cluster_file(option: Path | None, variables: Mapping[str, str] = os.environ) -> Path:
    """The cluster file: --cluster, else MEGAGROK_CLUSTER. Raises ConfigError if neither names one."""
    if option is not None:
        return option
    if not variables.get(CLUSTER_VARIABLE):
        raise ConfigError(
            f"no cluster file: give --cluster FILE, or set {CLUSTER_VARIABLE}. Begin with one of configs/cluster/"
        )
    return Path(variables[CLUSTER_VARIABLE])


def node_name(variables: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls the node of this task. Raises MachineError outside of a step."""
    try:
        return variables["SLURMD_NODENAME"]
    except KeyError as error:
        raise MachineError("this process is in no step of a Slurm job: srun starts it") from error


@dataclass(frozen=True, slots=True)
class Task:
    """This process as srun placed it among its step's tasks. `address` and `port` are where task 0 can be met."""

    rank: int
    count: int
    local_rank: int
    address: str
    port: int


def this_task(variables: Mapping[str, str] = os.environ) -> Task:
    """The task. Raises MachineError outside of a step."""
    try:
        return Task(
            rank=int(variables["SLURM_PROCID"]),
            count=int(variables["SLURM_NTASKS"]),
            local_rank=int(variables["SLURM_LOCALID"]),
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
        )
    except (KeyError, ValueError) as error:
        raise MachineError(f"this process is in no step that a supervisor started ({error})") from error


def gpus_shown(variables: Mapping[str, str] = os.environ) -> int:
    """GPUs that Slurm gave to this task, by its variables."""
    return len([device for device in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if device])
