"""Every ending leads to its decision; and what the pages say is read rightly."""

import dataclasses
import itertools

import pytest

from megagrok.slurm.decide import Decision, Ended, Situation, decide, ended_of
from megagrok.train.attempt import Attempt, Ending, NodePage, RankState

NODES = ["node1", "node2", "node3"]


def situation(code: int | None, **changes: object) -> Situation:
    ended = Ended(code, 7, 5, (), "", "step", 7, "")
    fields = {name: changes.pop(name) for name in list(changes) if name in Ended.__slots__}
    now = Situation(dataclasses.replace(ended, **fields), (), 0, 10, "running", False, None, 3, 2)
    return dataclasses.replace(now, **changes)


@pytest.mark.parametrize(
    ("now", "action", "code", "text"),
    [
        (situation(0), "done", 0, "done"),
        (situation(2), "stop", 2, "cannot cure"),
        (situation(3), "stop", 3, "cannot cure"),
        (situation(4), "stop", 4, "cannot cure"),
        (situation(5), "stop", 5, "cannot cure"),
        (situation(70), "stop", 70, "cannot cure"),
        (situation(1), "stop", 1, "none that megagrok gives"),
        (situation(143), "stop", 143, "none that megagrok gives"),
        (situation(76), "requeue", 76, "goes back to the queue"),
        (situation(75), "restart", 75, "restart 1 of at most 10, in this allocation"),
        (situation(None), "restart", 75, "in this allocation"),
        (situation(75, suspects=("node2",), usable_nodes=2), "restart", 75, "without node2"),
        (situation(75, suspects=("node2",), usable_nodes=1), "successor", 75, "in a new job without node2: 1 of 2"),
        (situation(75, deaths=(7,)), "restart", 75, ""),
        (situation(75, deaths=(7, 7)), "stop", 70, "3 deaths in a row got no further than step 7"),
        (situation(75, deaths=(7, 6)), "restart", 75, ""),
        (situation(75, deaths=(6, 7)), "restart", 75, ""),
        (situation(75, deaths=(7, 7, 6)), "restart", 75, ""),
        (situation(None, deaths=(7, 7), usable_nodes=0), "stop", 70, "no further"),
        (situation(76, deaths=(7, 7)), "requeue", 76, ""),
        (situation(75, restarts=9), "restart", 75, "restart 10 of at most 10"),
        (situation(75, restarts=10), "stop", 75, "somebody has to look"),
        (situation(75, max_restarts=0), "stop", 75, "max_restarts = 0"),
        (situation(76, restarts=99), "requeue", 76, ""),
        (situation(76, is_cancelled=True), "stop", 0, "cancelled"),
        (situation(75, is_cancelled=True), "stop", 0, "cancelled"),
        (situation(0, is_cancelled=True), "done", 0, ""),
        (situation(75, overtaken_by=9), "stop", 0, "job 9 was submitted later"),
        (situation(76, slurm="requeued"), "leave", 0, "Slurm has requeued"),
        (situation(75, slurm="requeued"), "leave", 0, "Slurm has requeued"),
        (situation(2, slurm="requeued"), "leave", 0, ""),
        (situation(76, slurm="ended"), "leave", 76, "Slurm has ended the job"),
        (situation(None, slurm="ended"), "leave", 75, "Slurm has ended the job"),
    ],
    ids=str,
)
def test_an_ending_leads_to_the_documented_decision(now: Situation, action: str, code: int, text: str) -> None:
    decision = decide(now)
    assert (decision.action, decision.exit_code) == (action, code)
    assert text in decision.text


def test_nothing_is_restarted_that_a_restart_cannot_cure_whatever_else_is_true() -> None:
    for code, slurm, usable, restarts, deaths in itertools.product(
        (0, 2, 3, 4, 5, 70), ("running", "requeued", "ended"), (0, 2), (0, 10), ((), (7, 7))
    ):
        now = situation(code, slurm=slurm, usable_nodes=usable, restarts=restarts, deaths=deaths)
        assert decide(now).action in ("done", "stop", "leave")


def test_no_chain_of_failures_goes_on_for_ever() -> None:
    deaths: list[int] = []
    for step in itertools.count():
        decision: Decision = decide(situation(75, furthest_step=step, deaths=tuple(deaths), restarts=len(deaths)))
        if decision.action == "stop":
            break
        deaths.append(step)
    assert len(deaths) == 10


def ending(code: int, *, rank: int | None = None, at: float = 1.0, suspect: bool = False, message: str = "") -> Ending:
    return Ending(
        exit_code=code, at=at, host="h", rank=rank, phase="step", step=7, error=None, message=message, saved_step=5,
        is_node_suspect=suspect,
    )  # fmt: skip


def attempt(*endings: Ending | None, count: int = 2) -> Attempt:
    ranks = (RankState(rank=0, pid=1, phase="save", step=8, beats=1, age_seconds=0.0),)
    return Attempt(
        3,
        tuple(
            NodePage(
                generation=3, node=index, num_nodes=count, host="h", job="1", restart=0, pid=1, started_at=0.0, at=1.0,
                ranks=ranks, ending=each,
            )
            for index, each in enumerate(endings)
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "code", "suspects", "who"),
    [
        (attempt(ending(0), ending(0)), 0, (), ""),
        (attempt(ending(76), ending(76)), 76, (), ""),
        (attempt(ending(75, at=1.0), ending(75, rank=3, at=2.0, suspect=True)), 75, ("node2",), "rank 3 on node2"),
        (attempt(ending(75, at=1.0), ending(75, rank=3, at=2.0)), 75, (), "rank 3 on node2"),
        (attempt(ending(75), None), 75, ("node2",), "node2"),
        (attempt(None, ending(75)), 75, ("node1",), "node1"),
        (attempt(ending(75), count=2), 75, ("node2",), "node2"),
        (attempt(None, None), None, (), ""),
        (attempt(ending(2, rank=0), None), 2, (), "rank 0 on node1"),
        (attempt(ending(76), None), 76, (), ""),
        (attempt(ending(0), ending(70, rank=2)), 70, (), "rank 2 on node2"),
    ],
)
def test_pages_name_the_first_failure_and_the_node_to_leave_out(
    found: Attempt, code: int | None, suspects: tuple[str, ...], who: str
) -> None:
    ended = ended_of(found, NODES[:2], 143)
    assert (ended.exit_code, ended.suspects, ended.who) == (code, suspects, who)
    assert ended.furthest_step == 8


def test_without_pages_srun_is_believed_only_about_what_no_restart_cures() -> None:
    assert [ended_of(None, NODES, code).exit_code for code in (2, 3, 4, 5, 70)] == [2, 3, 4, 5, 70]
    assert [ended_of(None, NODES, code).exit_code for code in (0, 1, 75, 76, 137, 143, None)] == [None] * 7
