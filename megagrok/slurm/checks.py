"""What keeps a submission from working, found before it waits in a queue: all problems at once.

Not what the nodes are like (preflight.py). Slurm's own refusal is passed on in Slurm's words; what Slurm lets pass and
would hurt later (late directives, a warning that comes too late for a save) is found here.
"""

import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrok.config.problems import Problem, placed
from megagrok.plan import check
from megagrok.slurm.journal import newest_submission, read_journal
from megagrok.slurm.queue import call, job_state
from megagrok.slurm.script import Submission, render, word_problems
from megagrok.train.attempt import generations, read_attempts
from megagrok.train.files import RunFiles

_DIRECTIVE = re.compile(r"^\s*#\s*SBATCH\b")
_OPTION = re.compile(r"^#SBATCH\s+--?(?P<name>[a-zA-Z][\w-]*)(?:[=\s]\s*(?P<value>\S+))?")
# Slurm may send the warning up to a minute early or late, and a save under load takes longer than the last one.
_SAVE_MARGIN = 2.0
_TAIL_BYTES = 1 << 20
_NEWEST_STARTS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """What earlier attempts of the same run took, in seconds; None where none got that far."""

    step: float | None
    save: float | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Problems keep a run from being submitted; notes say what could not be checked, or what to know."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    script: str
    """Empty if it could not be written at all."""


def check_submission(submission: Submission, environment: Mapping[str, str]) -> Findings:
    """Every check that this machine can make. Submits nothing and leaves nothing behind."""
    problems = placed(check(submission.run), submission.loaded.provenance)
    words = word_problems(submission)
    problems += words + layout_problems(submission) + mount_problems(submission)
    if words:
        return Findings(tuple(problems), (), "")
    problems += time_problems(submission, measure(submission.files)) + queue_problems(submission, environment)
    script = render(submission)
    problems += script_problems(script)
    notes: list[str] = []
    ping = call(["scontrol", "ping"], limit_seconds=10.0, environment=environment)
    with tempfile.TemporaryDirectory(prefix="megagrok-script-") as folder:
        path = Path(folder) / "job.sbatch"
        path.write_text(script, encoding="utf-8")
        commands = [["bash", "-n", str(path)], ["shellcheck", "--shell=bash", "--format=gcc", str(path)]]
        if ping.is_good:
            commands.append(["sbatch", "--test-only", str(path)])
        else:
            notes.append(f"not asked whether Slurm would take the job: {ping.sentence}")
        for command in commands:
            answer = call(command, environment=environment)
            if answer.status is None:
                notes.append(f"not checked: {answer.sentence}")
            elif not answer.is_good:
                problems.append(Problem("", f"{' '.join(command[:-1])}: {answer.sentence}"))
    return Findings(tuple(problems), tuple(notes), script)


def layout_problems(submission: Submission) -> list[Problem]:
    """Whether the layout fills nodes, and GPUs are there for its ranks."""
    ranks, full = submission.ranks, submission.cluster.full_node
    cluster = submission.cluster
    problems = []
    if ranks % full and ranks > full:
        below = ranks // full * full
        text = (
            f"the layout has {ranks} ranks, needs a multiple of {full}, the ranks of a node "
            f"({submission.cluster_path}). Fix: a layout of {below} or {below + full} ranks"
        )
        problems.append(Problem("parallel", text))
    if cluster.gpus_per_node and full > cluster.gpus_per_node:
        text = f"ranks_per_node = {full}, needs <= gpus_per_node ({cluster.gpus_per_node}): each rank has a GPU"
        problems.append(Problem("ranks_per_node", text))
    return problems


def mount_problems(submission: Submission) -> list[Problem]:
    """Whether ranks in a container see the run, its data and its configuration under the names that they are given."""
    container = submission.cluster.container
    if container is None:
        return []
    run = submission.run
    needed = {"the run": submission.files.root, "the configuration": submission.folder / submission.config_path}
    needed["the cache of the data"] = submission.folder / run.data.cache
    for name, path in (("data.tokens", run.data.tokens), ("data.tokenizer", run.data.tokenizer)):
        if path is not None:
            needed[name] = submission.folder / path
    needed |= {source.path: submission.folder / source.path for source in run.data.sources if source.path is not None}
    same = [Path(mount.source) for mount in container.mounts if mount.source == mount.target]
    return [
        Problem("container.mounts", f"container.mounts: {what} ({path}) is not below a mount under its own name")
        for what, path in needed.items()
        if not any(path.is_relative_to(mount) for mount in same)
    ]


def time_problems(submission: Submission, measured: Measured) -> list[Problem]:
    """Whether the time limit leaves room for a checkpoint, and its warning for a save."""
    cluster = submission.cluster
    lead, limit = cluster.signal_lead_seconds, cluster.walltime_seconds
    problems = []
    if measured.save is not None and lead < _SAVE_MARGIN * measured.save:
        wanted = max(60, round(_SAVE_MARGIN * measured.save / 60 + 0.5) * 60)
        text = f"signal_lead_seconds = {lead}, the slowest save of this run took {measured.save:.0f} s and has to fit"
        problems.append(Problem("signal_lead_seconds", f"{text} twice. Fix: signal_lead_seconds: {wanted}"))
    every = submission.run.checkpoint.every_steps
    if measured.step is not None and every * measured.step + (measured.save or 0.0) > limit - lead:
        first = every * measured.step + (measured.save or 0.0)
        text = (
            f"walltime = {cluster.walltime} less {lead} s of warning, a job's first checkpoint takes {_minutes(first)} "
            f"({every} steps of {measured.step:.3g} s). Fix: a longer walltime, or a smaller checkpoint.every_steps"
        )
        problems.append(Problem("walltime", text))
    return problems


def queue_problems(submission: Submission, environment: Mapping[str, str]) -> list[Problem]:
    """Whether another job of the same run waits or runs."""
    last = newest_submission(read_journal(submission.files))
    if last is None or not last.job:
        return []
    if call(["scontrol", "--version"], environment=environment).status is None:
        return []
    state = job_state(last.job, environment)
    if state is None or state.is_over:
        return []
    text = f"{submission.files.root} is in use by job {last.job} ({state.state.lower()})"
    return [Problem("", f"{text}. Fix: megagrok slurm cancel {last.job}, or another name (name=...)")]


def script_problems(script: str) -> list[Problem]:
    """What Slurm reads in a script without complaint and a resumable run does not survive."""
    problems = []
    begun = False
    for number, line in enumerate(script.splitlines(), start=1):
        if not line.strip() or (line.lstrip().startswith("#") and not _DIRECTIVE.match(line)):
            continue
        if not _DIRECTIVE.match(line):
            begun = True
        elif begun:
            text = f"line {number}: '{line.strip()}' comes after the first command, where Slurm ignores it: move it up"
            problems.append(Problem("", text))
        elif option := _OPTION.match(line):
            problems += _option_problems(number, option["name"], option["value"] or "")
        else:
            text = f"line {number}: '{line.strip()}' is a comment to Slurm: a directive begins with #SBATCH -"
            problems.append(Problem("", text))
    return problems


def measure(files: RunFiles) -> Measured:
    """What the run's own records say about how long things take. Reads at most the ends of them."""
    steps = []
    for line in _tail(files.metrics).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step_seconds"), float):
            steps.append(record["step_seconds"])
    starts = generations(files.root)[-_NEWEST_STARTS:]
    # metrics.jsonl has only what is the same on every machine; how long a save took is in the pages of the nodes.
    attempts = read_attempts(files.root, after=starts[0] - 1) if starts else []
    saves = [attempt.slowest_save_seconds for attempt in attempts if attempt.slowest_save_seconds is not None]
    return Measured(step=statistics.median(steps) if steps else None, save=max(saves, default=None))


def _tail(path: Path) -> str:
    """The end of a text; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _option_problems(number: int, name: str, value: str) -> list[Problem]:
    if name == "no-requeue":
        text = f"line {number}: --no-requeue, a run that is to go on by itself needs --requeue"
        return [Problem("", text)]
    if name in ("array", "a"):
        text = f"line {number}: --array={value}, the tasks of an array would all write to one run. Fix: one job per run"
        return [Problem("", text)]
    return []


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
