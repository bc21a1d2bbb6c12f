"""The real trainer on two nodes of a real Slurm: warned, preempted, cut off, and still the run that nobody touched."""

import shutil
import time

import pytest

from megagrok.slurm.checks import measure
from megagrok.train.files import RunFiles
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CLUSTER, CONFIGS, Desk
from tests.slurm.test_supervise import OVER, Story, megagrok
from tests.train.commands import assert_same_run, run, steps_in

STEPS = 40
RUN = """
base: {configs}/run/tiny.yaml
name: law
model:
  num_layers: 2
train:
  steps: {steps}
  seq_len: 16
  global_batch: 4
  evaluate_every_steps: 10
  evaluate_samples: 4
optimizer:
  eps: 1.0e-5
parallel:
  tensor: 2
  sequence: true
  data: 2
  expert: 2
data:
  cache: {cache}
  sources:
    - kind: python_stdlib
      max_bytes: 200_000
  held_out_fraction: 0.1
checkpoint:
  every_steps: 5
  keep: 99
telemetry:
  wandb: "off"
"""
pytestmark = pytest.mark.slow


def wait_for_step(story: Story, step: int, limit_seconds: float = 240.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while max(steps_in(story.files), default=0) < step:
        state = story.cluster.job(story.job)["JobState"]
        assert time.monotonic() < deadline and state not in OVER, f"{state}\n{story.log()}\n{story.cluster.logs()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """The run on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("untouched")
    config = folder / "run.yaml"
    config.write_text(RUN.format(configs=CONFIGS, steps=STEPS, cache=folder / "cache"), encoding="utf-8")
    run("train", config, folder=folder)
    return RunFiles(folder / "runs" / "law")


def submit(cluster: Cluster, desk: Desk, untouched: RunFiles, *, spare_nodes: int = 1) -> Story:
    """The same run, by one command."""
    shutil.copytree(untouched.root.parents[1] / "cache", desk.folder / "cache")
    desk.config.write_text(RUN.format(configs=CONFIGS, steps=STEPS, cache=desk.folder / "cache"), encoding="utf-8")
    site = CLUSTER.replace("spare_nodes: 1", f"spare_nodes: {spare_nodes}")
    desk.cluster.write_text(site + "environment:\n  OMP_NUM_THREADS: 1\n", encoding="utf-8")
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config)
    assert ran.status == 0, ran.err
    return Story(cluster, desk, RunFiles(desk.folder / "runs" / "law"), int(ran.out.split("job ")[1].partition(",")[0]))


def need_cables(cluster: Cluster) -> None:
    if not cluster.has_own_nodes:
        pytest.skip("a node's cable can be pulled only where nodes have namespaces of their own")


@pytest.mark.fault("F9")
def test_preempted_cut_off_and_requeued_it_is_the_run_that_nobody_touched(
    cluster: Cluster, desk: Desk, untouched: RunFiles
) -> None:
    need_cables(cluster)
    story = submit(cluster, desk, untouched)
    wait_for_step(story, 6)
    urgent = int(cluster.output("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "--wrap=sleep 1"))
    cluster.wait_for(urgent, "COMPLETED", limit_seconds=120)
    assert story.actions() == ["requeue"], story.log()
    preempted_at = max(steps_in(story.files))
    wait_for_step(story, preempted_at + 6)
    assert cluster.job(story.job)["Restarts"] == "1"
    cluster.unplug("node2")
    try:
        job = cluster.wait_for(story.job, *OVER, limit_seconds=300)
    finally:
        cluster.plug("node2")
    assert job["JobState"] == "COMPLETED", story.log()
    assert story.actions() == ["requeue", "restart", "done"]
    # What the next submission is checked against.
    measured = measure(story.files)
    assert measured.step is not None and measured.save is not None and measured.step > 0 < measured.save
    *_, last = story.lines("attempt")
    assert last.words("nodes") == ["node1", "node3"]
    assert_same_run(story.files, untouched, STEPS)


def test_the_node_of_the_supervisor_is_lost_and_another_hands_the_job_back(
    cluster: Cluster, desk: Desk, untouched: RunFiles
) -> None:
    need_cables(cluster)
    # With a spare the job outlives a lost node, and would go on without a head until its time limit.
    story = submit(cluster, desk, untouched, spare_nodes=1)
    wait_for_step(story, 11)
    cluster.unplug("node1")
    try:
        cluster.wait_for(story.job, "PENDING", limit_seconds=120)
    finally:
        cluster.plug("node1")
    job = cluster.wait_for(story.job, *OVER, limit_seconds=300)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), story.log()
    assert_same_run(story.files, untouched, STEPS)


@pytest.mark.parametrize(("spare_nodes", "pulled"), [(0, "node2"), (0, "node1")])
def test_a_lost_node_costs_no_step_that_was_saved(
    spare_nodes: int, pulled: str, cluster: Cluster, desk: Desk, untouched: RunFiles
) -> None:
    need_cables(cluster)
    story = submit(cluster, desk, untouched, spare_nodes=spare_nodes)
    wait_for_step(story, 11)
    cluster.unplug(pulled)
    try:
        job = cluster.wait_for(story.job, *OVER, limit_seconds=300)
        if (successor := story.lines("submitted")[-1].job) != story.job:
            job = cluster.wait_for(successor, *OVER, limit_seconds=300)
    finally:
        cluster.plug(pulled)
    assert job["JobState"] == "COMPLETED", story.log()
    assert_same_run(story.files, untouched, STEPS)
