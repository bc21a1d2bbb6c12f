"""What is done when an attempt ended: one pure function, so that every case is a line of a table in its test.

Nothing here talks to Slurm or reads a clock. The one idea: restart what a restart can cure, on nodes that have not
failed, as long as it gets further; stop for everything else, and say why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagrok.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_TRANSIENT
from megagrok.train.attempt import Attempt, Ending, NodePage

Action = Literal["done", "stop", "leave", "requeue", "restart", "successor"]
"""done and stop end the job; leave lets Slurm do what it has begun; requeue asks Slurm for the same job again;
restart goes on in this allocation; successor submits another job that leaves out nodes."""

# Exit codes of errors.py that a restart cannot cure.
FINAL_CODES = (2, 3, 4, 5, EXIT_BUG)
DEATHS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True, slots=True)
class Ended:
    """What one attempt came to. `exit_code` is None if no launcher could say."""

    exit_code: int | None
    furthest_step: int
    saved_step: int | None
    suspects: tuple[str, ...]
    """Nodes whose failure it may have been."""
    who: str
    """The rank or node that failed first, in words; empty if none did."""
    phase: str | None
    step: int | None
    message: str

    @property
    def is_death(self) -> bool:
        """Whether something was lost that a restart can bring back."""
        return self.exit_code is None or self.exit_code == EXIT_TRANSIENT


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that the decision depends on."""

    ended: Ended
    deaths: Sequence[int]
    """Furthest steps of the deaths before this one, oldest first, since a person submitted the run."""
    restarts: int
    """Failures that were followed by a restart, since then."""
    max_restarts: int
    slurm: Literal["running", "requeued", "ended"]
    """What Slurm has decided about the job meanwhile."""
    is_cancelled: bool
    overtaken_by: int | None
    """A later submission of the same run."""
    usable_nodes: int
    needed_nodes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, the exit code of the job if it ends, and why."""

    action: Action
    exit_code: int
    text: str


def decide(now: Situation) -> Decision:
    """The decision. Cases in order of precedence: the end, people, Slurm, what cannot be cured, what can."""
    _ended, code = now.ended, now.ended.exit_code
    if code == 0:
        return Decision("done", 0, "the run is done")
    if now.is_cancelled:
        return Decision("stop", 0, "the run was cancelled")
    if now.overtaken_by is not None:
        return Decision("stop", 0, f"job {now.overtaken_by} was submitted later and has the run now")
    if now.slurm == "requeued":
        return Decision("leave", 0, "Slurm has requeued the job")
    if now.slurm == "ended":
        return Decision("leave", code or EXIT_TRANSIENT, "Slurm has ended the job (scancel, or the time limit)")
    if code in FINAL_CODES:
        assert code is not None
        return Decision("stop", code, f"exit code {code}: a restart cannot cure it")
    if code == EXIT_PREEMPTED:
        return Decision("requeue", EXIT_PREEMPTED, "the job goes back to the queue, and on from there")
    if code is not None and code != EXIT_TRANSIENT:
        return Decision("stop", code, f"exit code {code} is none that megagrok gives: look first")
    return _after_death(now)


def _after_death(now: Situation) -> Decision:
    deaths = [*now.deaths, now.ended.furthest_step][-DEATHS_WITHOUT_PROGRESS:]
    if len(deaths) == DEATHS_WITHOUT_PROGRESS and len(set(deaths)) == 1:
        text = f"{len(deaths)} deaths in a row got no further than step {deaths[0]}: another restart would not either"
        return Decision("stop", EXIT_BUG, text)
    if now.restarts >= now.max_restarts:
        text = f"{now.restarts} restarts, max_restarts = {now.max_restarts}: somebody has to look"
        return Decision("stop", EXIT_TRANSIENT, text)
    count = f"restart {now.restarts + 1} of at most {now.max_restarts}"
    left_out = f" without {', '.join(now.ended.suspects)}" if now.ended.suspects else ""
    if now.usable_nodes >= now.needed_nodes:
        return Decision("restart", EXIT_TRANSIENT, f"{count}, in this allocation{left_out}")
    text = f"{count}, in a new job{left_out}: {now.usable_nodes} of {now.needed_nodes} nodes are left here"
    return Decision("successor", EXIT_TRANSIENT, text)


def ended_of(attempt: Attempt | None, nodes: Sequence[str], srun_code: int | None, lost: Sequence[str] = ()) -> Ended:
    """What the pages of an attempt say. Not srun: its code is the highest of all nodes', or that of a signal.

    nodes: Slurm's names, in the order of the pages.  srun_code: used only if no launcher came so far as to have a page.
    lost: nodes that Slurm holds for dead, or whose pages stood still; what the others say about that is an echo.
    """
    if attempt is None or not attempt.nodes:
        code = srun_code if srun_code in FINAL_CODES else None
        text = _silence(lost) if lost else "no node came so far as to say; see the job's log"
        return Ended(code, 0, None, tuple(lost), " and ".join(lost), None, None, text)
    first, page = _explaining(attempt)
    code = None if first is None else first.exit_code
    by_index = {each.node: each for each in attempt.nodes}
    silent = [index for index in range(len(nodes)) if index not in by_index or by_index[index].ending is None]
    suspects: list[str] = []
    if code is None or code == EXIT_TRANSIENT:
        if lost:
            suspects, silent = list(lost), [index for index, node in enumerate(nodes) if node in lost]
        elif first is not None and page is not None and first.rank is not None:
            # A rank that raised an error of its own would do so on any node.
            suspects = [_name(nodes, page.node)] if first.is_node_suspect else []
        elif first is not None:
            # Everybody who spoke lost a peer; who did not speak is lost.
            suspects = [_name(nodes, index) for index in silent]
    who, phase, step, message = "", None, None, ""
    if first is not None and page is not None and not lost:
        where = f"rank {first.rank} on {_name(nodes, page.node)}" if first.rank is not None else ""
        who, phase, step, message = where, first.phase, first.step, first.message
    if suspects and not who:
        who, message = " and ".join(suspects), f"{_silence(suspects)}. {message}".strip()
        phase, step = _last_seen([by_index[index] for index in silent if index in by_index], phase, step)
    return Ended(code, attempt.furthest_step, attempt.saved_step, tuple(suspects), who, phase, step, message)


def _silence(nodes: Sequence[str]) -> str:
    return f"{' and '.join(nodes)} fell silent"


def _explaining(attempt: Attempt) -> tuple[Ending | None, NodePage | None]:
    first = attempt.ending
    return first, next((page for page in attempt.nodes if first is not None and page.ending is first), None)


def _name(nodes: Sequence[str], index: int) -> str:
    return nodes[index] if index < len(nodes) else f"node {index}"


def _last_seen(pages: Sequence[NodePage], phase: str | None, step: int | None) -> tuple[str | None, int | None]:
    """What the ranks of silent nodes were doing when they were last heard."""
    ranks = [rank for page in pages for rank in page.ranks]
    last = max(ranks, key=lambda rank: rank.step, default=None)
    return (phase, step) if last is None else (last.phase, last.step)
