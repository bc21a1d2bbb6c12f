"""A script is shown, checked by everything that can check it, and handed in; or nothing happens and all is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrok.slurm.checks import Measured, script_problems, time_problems
from megagrok.slurm.journal import read_journal
from megagrok.slurm.script import Submission, read_submission, render
from megagrok.train.files import RunFiles
from tests.slurm.cluster import Cluster, Ran
from tests.slurm.conftest import CLUSTER, Desk

LAUNCH = Path(__file__).parents[2] / "launch" / "train.sbatch"
LIMIT_SECONDS = 60


def megagrok(cluster: Cluster, desk: Desk, *arguments: object) -> Ran:
    """The command on the login node, in the desk's folder."""
    variables = {"MEGAGROK_CLUSTER": str(desk.cluster)}
    return cluster.call(
        sys.executable, "-m", "megagrok", *arguments,
        folder=desk.folder, environment=variables, limit_seconds=LIMIT_SECONDS,
    )  # fmt: skip


def submission(desk: Desk, *overrides: str, more: str = "", monkeypatch: pytest.MonkeyPatch) -> Submission:
    desk.cluster.write_text(CLUSTER + more, encoding="utf-8")
    monkeypatch.chdir(desk.folder)
    return read_submission(desk.config, overrides, desk.cluster)


def test_a_dry_run_shows_the_script_that_passes_every_check_and_submits_nothing(cluster: Cluster, desk: Desk) -> None:
    before = sorted(desk.folder.rglob("*"))
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config, "--dry-run")
    assert ran.status == 0, ran.err
    assert "all checks passed" in ran.out
    assert "note: " not in ran.out, "a check was left out"
    assert "#SBATCH --nodes=3" in ran.out
    assert sorted(desk.folder.rglob("*")) == before
    assert cluster.output("squeue", "--noheader") == ""


def test_a_rendered_script_is_the_one_that_submit_shows_and_overwrites_nothing(cluster: Cluster, desk: Desk) -> None:
    path = desk.folder / "job.sbatch"
    assert megagrok(cluster, desk, "slurm", "render", desk.config, "--output", path).status == 0
    assert path.read_text() in megagrok(cluster, desk, "slurm", "submit", desk.config, "--dry-run").out
    assert megagrok(cluster, desk, "slurm", "render", desk.config, "--output", path).status == 5
    for check in (["bash", "-n"], ["shellcheck"], ["sbatch", "--test-only"]):
        assert cluster.call(*check, path).status == 0


def test_everything_that_is_wrong_is_told_at_once_with_slurms_own_sentence(cluster: Cluster, desk: Desk) -> None:
    desk.cluster.write_text(CLUSTER + "partition: nowhere\n", encoding="utf-8")
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config, "optimizer.lr=-1.0", "parallel.data=3")
    assert ran.status == 2
    for text in (
        "optimizer.lr = -1.0, needs > 0",
        "the layout has 3 ranks, needs a multiple of 2",
        "invalid partition",
    ):
        assert text in ran.err
    assert not (desk.folder / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("gpus_per_node: 9\nranks_per_node: 4", "Requested node configuration is not available"),
        ("spare_nodes: 7", "Node count specification invalid"),
        ('walltime: "9-00:00:00"', "time limit"),
        ("constraint: h100", "feature"),
        ("reservation: mine", "reservation"),
    ],
    ids=lambda text: text.partition(":")[0],
)
def test_what_the_cluster_does_not_have_is_refused_in_slurms_words(
    lines: str, text: str, cluster: Cluster, desk: Desk
) -> None:
    keys = [line.partition(":")[0] for line in lines.splitlines()]
    kept = [line for line in CLUSTER.splitlines() if line.partition(":")[0] not in keys]
    desk.cluster.write_text("\n".join([*kept, lines, ""]), encoding="utf-8")
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config)
    assert ran.status == 2
    assert "sbatch --test-only: " in ran.err
    assert text.lower() in ran.err.lower()
    assert not (desk.folder / "runs").exists()


def test_gpus_that_nodes_have_are_asked_for(cluster: Cluster, desk: Desk) -> None:
    desk.cluster.write_text(CLUSTER.replace("gpus_per_node: 0", "gpus_per_node: 8"), encoding="utf-8")
    ran = megagrok(cluster, desk, "slurm", "submit", desk.config, "--dry-run")
    assert ran.status == 0, ran.err
    assert "#SBATCH --gpus-per-node=8" in ran.out


def test_a_run_is_not_submitted_twice(cluster: Cluster, desk: Desk) -> None:
    cluster.output("sbatch", "--wrap=sleep 60", "--nodes=3", "--exclusive")
    first = megagrok(cluster, desk, "slurm", "submit", desk.config)
    assert first.status == 0, first.err
    (line,) = read_journal(RunFiles(desk.folder / "runs" / "law"))
    assert f"law: job {line.job}, 2 nodes, 4 ranks." in first.out
    second = megagrok(cluster, desk, "slurm", "submit", desk.config)
    assert second.status == 2
    assert f"is in use by job {line.job} (pending)" in second.err


def test_the_plain_script_is_clean_and_has_no_late_directive(cluster: Cluster) -> None:
    assert script_problems(LAUNCH.read_text(encoding="utf-8")) == []
    for check in (["bash", "-n"], ["shellcheck"], ["sbatch", "--test-only", "--nodes=2"]):
        ran = cluster.call(*check, LAUNCH, limit_seconds=30)
        assert ran.status == 0, ran.out + ran.err


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("echo hello\n#SBATCH --nodes=9", "comes after the first command, where Slurm ignores it"),
        ("#SBATCH --no-requeue", "needs --requeue"),
        ("#SBATCH --array=0-9", "would all write to one run"),
        ("#SBATCH -a 0-9", "would all write to one run"),
        ("# SBATCH --nodes=9", "is a comment to Slurm"),
        ("#SBATCH nodes=9", "is a comment to Slurm"),
    ],
)
def test_what_slurm_passes_over_in_silence_is_found(line: str, text: str) -> None:
    (problem,) = script_problems(f"#!/bin/bash\n# words\n#SBATCH --requeue\n\n{line}\n")
    assert text in str(problem)


def test_a_script_quotes_nothing_because_all_of_it_is_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    script = render(submission(desk, "train.steps=20", monkeypatch=monkeypatch))
    assert "'" not in script and '"' not in script
    assert script.splitlines()[-1].endswith(f"{desk.config} train.steps=20 --cluster {desk.cluster}")


def test_a_warning_that_comes_too_late_for_a_save_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = submission(desk, monkeypatch=monkeypatch)
    assert time_problems(wanted, Measured(step=1.0, save=29.0)) == []
    (problem,) = time_problems(wanted, Measured(step=1.0, save=140.0))
    assert "took 140 s" in str(problem) and "signal_lead_seconds: 300" in str(problem)


def test_a_time_limit_without_room_for_one_checkpoint_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = submission(desk, "checkpoint.every_steps=10", monkeypatch=monkeypatch)
    assert time_problems(wanted, Measured(step=50.0, save=None)) == []
    (problem,) = time_problems(wanted, Measured(step=60.0, save=None))
    assert "walltime = 00:10:00" in str(problem) and "takes 10 min (10 steps of 60 s)" in str(problem)


def test_ranks_in_a_container_have_to_see_the_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagrok.slurm.checks import mount_problems

    more = "container: {image: a.sqsh, mounts: [{source: /nowhere, target: /nowhere}]}\n"
    assert len(mount_problems(submission(desk, more=more, monkeypatch=monkeypatch))) == 3
    more = f"container: {{image: a.sqsh, mounts: [{{source: {desk.folder}, target: {desk.folder}}}]}}\n"
    assert mount_problems(submission(desk, more=more, monkeypatch=monkeypatch)) == []


def test_a_login_node_needs_no_torch() -> None:
    program = "import sys, megagrok.slurm.submit\nprint([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
