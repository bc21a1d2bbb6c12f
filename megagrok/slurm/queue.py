"""Talking to Slurm through its own commands: argument lists, never a shell, and never for ever.

Not a binding to its library, which changes with every version. `sacct` is not asked: many sites keep no accounting.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagrok.errors import MachineError

# A busy slurmctld takes its time; one that is gone would make a command wait for minutes.
LIMIT_SECONDS = 60.0
GONE = "Invalid job id specified"


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended. `status` is None if it did not, within its limit, or is not installed."""

    status: int | None
    out: str
    err: str

    @property
    def is_good(self) -> bool:
        """Whether the command did what it was asked."""
        return self.status == 0

    @property
    def sentence(self) -> str:
        """What it complained about, as Slurm words it, on one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or f"exit status {self.status}"


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Slurm sees it now. `restarts` counts requeues; a requeue counts as soon as it is decided."""

    id: int
    state: str
    reason: str
    restarts: int
    is_requeueable: bool
    nodes: str
    time_limit: str
    end_time: str
    comment: str

    @property
    def is_over(self) -> bool:
        """Whether the job can no longer run."""
        return self.state.split("+")[0] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


def call(command: Sequence[str], *, limit_seconds: float = LIMIT_SECONDS, environment: Mapping[str, str]) -> Answer:
    """Run a command to its end, or kill it at the limit."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=limit_seconds,
            stdin=subprocess.DEVNULL, env=dict(environment), check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(None, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{command[0]} did not answer within {limit_seconds:g} s")
    return Answer(done.returncode, done.stdout, done.stderr)


def job_state(job: int, environment: Mapping[str, str]) -> JobState | None:
    """What `scontrol show job` says; None if Slurm has forgotten the job. Raises MachineError if Slurm is silent."""
    answer = call(["scontrol", "--oneliner", "show", "job", str(job)], environment=environment)
    if not answer.is_good:
        if GONE in answer.err:
            return None
        raise MachineError(f"Slurm says nothing about job {job}: {answer.sentence}")
    fields = dict(word.split("=", 1) for word in answer.out.split() if "=" in word)
    return JobState(
        id=job,
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", "0")),
        is_requeueable=fields.get("Requeue") == "1",
        nodes=fields.get("NodeList", "(null)"),
        time_limit=fields.get("TimeLimit", ""),
        end_time=fields.get("EndTime", ""),
        comment=fields.get("Comment", ""),
    )


def down_nodes(nodes: Sequence[str], environment: Mapping[str, str], *, or_silent: bool = False) -> list[str]:
    """Those of `nodes` that Slurm holds for dead; with `or_silent` those too that have missed a call of Slurm's."""
    command = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %t"]
    words = [line.split() for line in call(command, environment=environment).out.splitlines()]
    down = {name for name, state in words if "down" in state or (or_silent and state.endswith("*"))}
    return [node for node in nodes if node in down]


def node_names(node_list: str, environment: Mapping[str, str]) -> list[str]:
    """A folded list of nodes, unfolded by Slurm. Raises MachineError if it cannot be."""
    answer = call(["scontrol", "show", "hostnames", node_list], environment=environment)
    if not answer.is_good:
        raise MachineError(f"Slurm does not unfold the node list {node_list}: {answer.sentence}")
    return answer.out.split()


def node_address(node: str, environment: Mapping[str, str]) -> str:
    """Where other nodes reach `node`: its name where names resolve, else the address that Slurm itself uses.

    Asked in the job, on a node: a login node may resolve more. The last resort, the node's own word, costs a step.
    Raises MachineError if none is found.
    """
    if call(["getent", "hosts", node], environment=environment, limit_seconds=10).is_good:
        return node
    answer = call(["scontrol", "--oneliner", "show", "node", node], environment=environment)
    fields = dict(word.split("=", 1) for word in answer.out.split() if "=" in word)
    if (address := fields.get("NodeAddr", node)) != node:
        return address
    asked = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "hostname", "--ip-address"]
    answer = call(asked, environment=environment)
    if answer.is_good and answer.out.split():
        return answer.out.split()[0]
    raise MachineError(f"no address of node {node}: it does not resolve, and Slurm knows none ({answer.sentence})")
