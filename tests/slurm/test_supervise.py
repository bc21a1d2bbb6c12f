"""In a real job, on real nodes: what the supervisor does when something ends. Launchers are stand-ins here."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megagrok.slurm.journal import Line, read_journal
from megagrok.train.files import RunFiles
from tests.slurm.cluster import Cluster, Ran
from tests.slurm.conftest import CLUSTER, Desk

STAND_IN = Path(__file__).with_name("stand_in.py")
LAUNCH = Path(__file__).parents[2] / "launch" / "train.sbatch"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Story:
    """A run that was submitted, with launchers that follow a scenario."""

    cluster: Cluster
    desk: Desk
    files: RunFiles
    job: int

    def end(self) -> dict[str, str]:
        """Wait until the job is over."""
        return self.cluster.wait_for(self.job, *OVER, limit_seconds=LIMIT_SECONDS)

    def lines(self, event: str) -> list[Line]:
        return [line for line in read_journal(self.files) if line.event == event]

    def actions(self) -> list[object]:
        return [line.facts["action"] for line in self.lines("decided")]

    def wait_for_start(self, number: int = 1) -> None:
        """Until the launchers of a start have told of themselves."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(self.files.root.glob(f"attempts/{number:05d}/node-*.json"))) < 2:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.files.root.glob("logs/*.log"))

    def call(self, *arguments: object) -> Ran:
        return megagrok(self.cluster, self.desk, *arguments)

    def why(self) -> list[str]:
        """The five lines."""
        ran = self.call("slurm", "why", self.files.root)
        assert ran.status == 0, ran.err
        lines = ran.out.splitlines()
        assert [line.split()[0] for line in lines] == ["ended", "first", "where", "saved", "next"]
        return lines


def megagrok(cluster: Cluster, desk: Desk, *arguments: object) -> Ran:
    return cluster.call(
        sys.executable, "-m", "megagrok", *arguments,
        folder=desk.folder, environment={"MEGAGROK_CLUSTER": str(desk.cluster)}, limit_seconds=LIMIT_SECONDS,
    )  # fmt: skip


def tell(cluster: Cluster, desk: Desk, *starts: dict[str, Any], site: str = "", **more: object) -> Story:
    """Submit the run; its launchers end as `starts` say, the last one for all further starts.

    site: lines of the cluster file that replace those of the same name.  more: further parts of the scenario.
    """
    stand_in = desk.folder / "nodes" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    text = STAND_IN.read_text(encoding="utf-8")
    stand_in.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    stand_in.chmod(0o755)
    files = RunFiles(desk.folder / "runs" / "law")
    scenario = {"starts": starts, "python": sys.executable, "root": str(files.root), **more}
    (stand_in.parent / "scenario.json").write_text(json.dumps(scenario), encoding="utf-8")
    names = [line.partition(":")[0] for line in site.splitlines()]
    kept = [line for line in CLUSTER.splitlines() if line.partition(":")[0] not in names]
    desk.cluster.write_text("\n".join([*kept, f"venv: {desk.folder}/nodes", site, ""]), encoding="utf-8")
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config)
    assert ran.status == 0, ran.err
    return Story(cluster, desk, files, int(ran.out.split("job ")[1].partition(",")[0]))


def sbatch(cluster: Cluster, desk: Desk, *options: str) -> Ran:
    """The plain script, by a person who has megagrok on the PATH."""
    command = desk.folder / "on-path" / "megagrok"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megagrok "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    export = f"--export=ALL,MEGAGROK_CLUSTER={desk.cluster},PATH={command.parent}:/usr/bin:/bin"
    return cluster.call("sbatch", "--parsable", *options, export, LAUNCH, desk.config, folder=desk.folder)


def both(**plan: object) -> dict[str, Any]:
    return {"0": plan, "1": plan}


def test_a_run_that_ends_well_ends_the_job(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=0, step=10))
    assert story.end()["JobState"] == "COMPLETED", story.log()
    assert story.actions() == ["done"]
    (fit,) = story.lines("preflight")
    assert fit.words("fit") == cluster.nodes
    assert not list(story.files.root.glob("preflight-*"))
    where = "node1" if cluster.has_own_nodes else "127.0.0.1"
    assert f"start 1 on node2, {where}:{20000 + story.job % 20000}" in story.log()
    assert "exit code 0, done" in story.why()[0]
    assert story.why()[4] == f"next   megagrok generate {story.files.root}"


@pytest.mark.parametrize("code", [2, 70, *(pytest.param(code, marks=pytest.mark.slow) for code in (3, 4, 5))])
def test_what_a_restart_cannot_cure_is_not_restarted(code: int, cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, {"0": {"code": code, "rank": 1, "message": "it is so"}, "1": {"code": 75}})
    job = story.end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{code}:0", "0"), story.log()
    assert story.actions() == ["stop"]
    ended, first, where, saved, what_next = story.why()
    assert f"exit code {code}" in ended and "a restart cannot cure it" in ended
    assert first == "first  rank 1 on node1: it is so"
    assert where == "where  step 1, phase step"
    assert saved == "saved  nothing; up to 1 step(s) are done again"
    assert f"megagrok slurm submit {desk.config} --cluster {desk.cluster}" in what_next


def test_a_killed_rank_costs_its_node_and_the_spare_takes_over(cluster: Cluster, desk: Desk) -> None:
    killed = {"0": {"code": 75}, "1": {"code": 75, "rank": 3, "suspect": True, "message": "killed by SIGKILL"}}
    story = tell(cluster, desk, killed, both(code=0))
    assert story.end()["JobState"] == "COMPLETED", story.log()
    assert story.actions() == ["restart", "done"]
    assert [line.words("nodes") for line in story.lines("attempt")] == [["node1", "node2"], ["node1", "node3"]]
    assert story.lines("ended")[0].words("suspects") == ["node2"]


@pytest.mark.slow
def test_a_rank_that_raised_does_not_cost_its_node(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, {"0": {"code": 75, "rank": 0}, "1": {"code": 75}}, both(code=0))
    assert story.end()["JobState"] == "COMPLETED", story.log()
    assert [line.words("nodes") for line in story.lines("attempt")] == [["node1", "node2"]] * 2


def test_a_launcher_that_is_killed_costs_its_node(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, {"0": {"die": True}, "1": {"code": 75}}, both(code=0))
    assert story.end()["JobState"] == "COMPLETED", story.log()
    assert [line.words("nodes") for line in story.lines("attempt")] == [["node1", "node2"], ["node2", "node3"]]
    assert "node1 first" in story.lines("ended")[0].text


def test_without_a_spare_a_successor_leaves_the_node_out(cluster: Cluster, desk: Desk) -> None:
    killed = {"0": {"code": 75}, "1": {"code": 75, "rank": 3, "suspect": True, "message": "killed by SIGKILL"}}
    story = tell(cluster, desk, killed, both(code=0), site="spare_nodes: 0")
    assert story.end()["ExitCode"] == "75:0", story.log()
    _, successor = story.lines("submitted")
    assert successor.words("exclude") == ["node2"]
    cluster.wait_for(successor.job, "COMPLETED", limit_seconds=LIMIT_SECONDS)
    assert [line.words("nodes") for line in story.lines("attempt")] == [["node1", "node2"], ["node1", "node3"]]
    assert story.actions() == ["successor", "done"]


@pytest.mark.fault("F33")
def test_three_deaths_at_one_step_end_the_run(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=75, rank=0, step=3, message="no"))
    job = story.end()
    assert job["ExitCode"] == "70:0", story.log()
    assert story.actions() == ["restart", "restart", "stop"]
    assert "3 deaths in a row got no further than step 3" in story.why()[0]


@pytest.mark.slow
def test_restarts_are_counted_and_capped(cluster: Cluster, desk: Desk) -> None:
    steps = [both(code=75, rank=0, step=step) for step in (1, 2, 3)]
    story = tell(cluster, desk, *steps, site="max_restarts: 2")
    assert story.end()["ExitCode"] == "75:0", story.log()
    assert story.actions() == ["restart", "restart", "stop"]


def test_a_warning_is_passed_on_once_and_the_job_comes_back(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=75, seconds=50, step=4, saved=4), both(code=0, step=9))
    story.wait_for_start()
    assert "is running on node[1-3]" in story.call("slurm", "status", story.job).out
    assert story.why()[:2] == ["ended  it runs: start 1", "first  nobody has failed"]
    for _ in range(2):
        cluster.output("scancel", "--batch", "--signal=USR1", story.job)
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), story.log()
    assert story.actions() == ["requeue", "done"]
    assert [line.restart for line in story.lines("started")] == [0, 1]
    assert story.log().count(f"started on {', '.join(cluster.nodes)}") <= 2
    assert "0 after failures, 1 after requeues" in story.call("slurm", "status", story.files.root).out


@pytest.mark.slow
def test_a_requeue_by_slurm_is_left_to_slurm(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=75, seconds=50), both(code=0))
    story.wait_for_start()
    cluster.output("scontrol", "requeue", story.job)
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), story.log()
    assert story.actions() == ["leave", "done"]


def test_scancel_is_final(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=75, seconds=50))
    story.wait_for_start()
    cluster.output("scancel", story.job)
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), story.log()
    time.sleep(1)
    assert set(story.actions()) <= {"leave"}
    assert len(story.lines("submitted")) == 1


def test_cancel_saves_and_is_final(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=75, seconds=50))
    story.wait_for_start()
    ran = story.call("slurm", "cancel", story.job)
    assert ran.status == 0 and f"job {story.job} saves and ends" in ran.out, ran.err
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), story.log()
    assert story.actions() == ["stop"]
    assert story.lines("ended")[0].number("exit_code") == 76
    assert "the run was cancelled" in story.why()[0]
    assert story.why()[4].startswith("next   megagrok slurm submit ")


def test_a_waiting_job_is_cancelled(cluster: Cluster, desk: Desk) -> None:
    cluster.output("sbatch", "--wrap=sleep 60", "--nodes=3", "--exclusive")
    story = tell(cluster, desk, both(code=0))
    assert "is pending" in story.call("slurm", "status", story.files.root).out
    assert "has left the queue" in story.call("slurm", "cancel", story.files.root).out
    assert story.end()["JobState"] == "CANCELLED"
    assert not (story.files.root / "attempts").exists()


def test_an_unfit_node_is_named_and_the_spare_takes_its_place(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=0), open_files={"node1": 100})
    assert story.end()["JobState"] == "COMPLETED", story.log()
    assert [line.words("nodes") for line in story.lines("attempt")] == [["node2", "node3"]]
    assert "2 of 3 nodes are fit, left out: node1: ulimit -n 100, needs 256" in story.log()


@pytest.mark.slow
def test_too_few_fit_nodes_go_to_a_successor_and_none_at_all_to_a_person(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=0), site="spare_nodes: 0", open_files={"node1": 100})
    story.end()
    assert story.lines("submitted")[1].words("exclude") == ["node1"], story.log()
    cluster.wait_for(story.lines("submitted")[1].job, "COMPLETED", limit_seconds=LIMIT_SECONDS)
    shutil.rmtree(desk.folder / "nodes")
    shutil.rmtree(desk.folder / "runs")
    story = tell(cluster, desk, both(code=0), open_files=dict.fromkeys(cluster.nodes, 100))
    assert story.end()["ExitCode"] == "5:0"
    assert "no node is fit" in story.log()


def test_a_plain_sbatch_does_the_same(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=0))
    story.end()
    shutil.rmtree(story.files.root)
    job = int(sbatch(cluster, desk, "-N3").out)
    assert cluster.wait_for(job, *OVER)["JobState"] == "COMPLETED", (desk.folder / f"megagrok-{job}.log").read_text()
    assert story.actions() == ["done"]
    assert f"{story.files.root}" == cluster.job(job)["Comment"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-N1"], "the job has 1 nodes, the layout needs 2"),
        pytest.param(["-N2", "--array=0-0"], "this job is an array", marks=pytest.mark.slow),
        pytest.param(["-N2", "--no-requeue"], "cannot be requeued", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_cannot_carry_the_run_ends_at_once(
    options: list[str], text: str, cluster: Cluster, desk: Desk
) -> None:
    ran = sbatch(cluster, desk, *options)
    assert cluster.wait_for(int(ran.out), *OVER)["ExitCode"] == "2:0"
    assert any(text in path.read_text() for path in desk.folder.glob("megagrok-*.log"))


@pytest.mark.slow
def test_the_time_limit_is_warned_of_and_the_job_comes_back(cluster: Cluster, desk: Desk) -> None:
    site = 'walltime: "00:01:00"\nsignal_lead_seconds: 30'
    story = tell(cluster, desk, both(code=75, seconds=200, step=4, saved=4), both(code=0, step=9), site=site)
    job = story.cluster.wait_for(story.job, *OVER, limit_seconds=150)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), story.log()
    assert story.actions() == ["requeue", "done"]


@pytest.mark.slow
def test_ten_requeues_need_no_person_and_truncate_no_log(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, *[both(code=75, seconds=100)] * 10, both(code=0))
    for number in range(1, 11):
        story.wait_for_start(number)
        cluster.output("scontrol", "requeue", story.job)
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "10"), story.log()
    assert story.actions()[-1] == "done"
    (log,) = story.files.root.glob("logs/*.log")
    for restart in range(11):
        assert f"restart {restart}: starting on" in log.read_text()


@pytest.mark.slow
def test_a_controller_that_restarts_disturbs_no_rank(cluster: Cluster, desk: Desk) -> None:
    story = tell(cluster, desk, both(code=0, seconds=12))
    story.wait_for_start()
    cluster.output("kill", (cluster.root / "slurmctld.pid").read_text().strip())
    time.sleep(3)
    cluster.output("slurmctld")
    job = story.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), story.log()
    assert len(story.lines("attempt")) == 1
