"""Where this process stands among those that a launcher started: read once from the environment.

The only file, with launch.py, that touches the process environment. Two kinds of starts are known. torchrun starts
ranks, and each joins. srun starts one launcher per node, which forks its ranks and watches them; a plain command on one
machine is such a launcher that is alone.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megagrok.errors import MachineError


@dataclass(frozen=True, slots=True)
class Placement:
    """This process is a rank that torchrun started. `address` and `port` are where rank 0 can be met."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """This process is the launcher of one node. `address` and `port` are where node 0 can be met; unread if alone."""

    index: int = 0
    count: int = 1
    address: str = ""
    port: int = 0
    job: str | None = None
    """Slurm's job id, on one node too."""
    restart: int = 0
    """How often Slurm has requeued the job."""
    step: str = "0"
    """Slurm's step id: with the job it names this start, so that nobody meets the remains of another."""

    def local_ranks(self, world_size: int) -> range:
        """The ranks of this node: consecutive, the same number on each. Raises MachineError if they do not divide."""
        if world_size % self.count:
            raise MachineError(
                f"the layout has {world_size} ranks, {self.count} nodes were started: each node needs as many as the "
                f"others. Start a number of nodes that divides {world_size}."
            )
        each = world_size // self.count
        return range(self.index * each, (self.index + 1) * each)


def discover(environment: Mapping[str, str] = os.environ) -> Placement | Nodes:
    """Which launcher started this process, and as what.

    torchrun is recognised by RANK with MASTER_ADDR, and wins where both are present (torchrun inside srun). A batch
    script is no Slurm step and counts as alone. Raises MachineError, naming every variable that is missing or no
    number, and for a step with several tasks on a node.
    """
    if "RANK" in environment and "MASTER_ADDR" in environment:
        rank, world_size, local_rank, port = _numbers(
            "torchrun", environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
        )
        return Placement(rank, world_size, local_rank, environment["MASTER_ADDR"], port)
    job, restart = environment.get("SLURM_JOB_ID"), environment.get("SLURM_RESTART_COUNT", "0")
    if "SLURM_STEP_ID" not in environment:
        return Nodes(job=job, restart=int(restart) if restart.isdecimal() else 0)
    names = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS", "SLURM_JOB_ID")
    index, count, tasks, number = _numbers("srun", environment, *names)
    if tasks != count:
        raise MachineError(
            f"srun started {tasks} tasks on {count} nodes; megagrok forks and watches the ranks of a node itself. "
            "Start one task per node: srun --ntasks-per-node=1."
        )
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    port = int(environment.get("MASTER_PORT", 20000 + number % 20000))
    step = environment["SLURM_STEP_ID"]
    return Nodes(index, count, address, port, job, int(restart) if restart.isdecimal() else 0, step)


def _numbers(launcher: str, environment: Mapping[str, str], *names: str) -> list[int]:
    wrong = [f"{name}={environment.get(name)}" for name in names if not environment.get(name, "").isdecimal()]
    if wrong:
        raise MachineError(
            f"this process looks started by {launcher}, but {', '.join(wrong)}: each must be a whole number. "
            f"Start it with {launcher}, or unset the variables to fork the ranks here."
        )
    return [int(environment[name]) for name in names]


def _first_host(environment: Mapping[str, str]) -> str:
    """Task 0's host: the first of Slurm's node list, as in node[07-12,20],other3. One node meets on itself."""
    if environment["SLURM_STEP_NUM_NODES"] == "1":
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise MachineError(
            "started by srun, but SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the address of rank 0's node"
        )
    return first[1] + (first[2] or "")
