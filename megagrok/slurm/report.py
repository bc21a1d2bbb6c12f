"""`status`, `logs`, `why` and `cancel`: what became of a run, for a person on a login node.

Read from the run's folder, and from Slurm's queue as long as it remembers the job; never from an accounting database.
"""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrok.config import load_config
from megagrok.errors import CheckpointError, ConfigError, MachineError, MegagrokError
from megagrok.slurm.decide import Ended, ended_of
from megagrok.slurm.environment import environment
from megagrok.slurm.journal import Line, newest_submission, read_journal, since_submission, write_line
from megagrok.slurm.queue import JobState, call, job_state
from megagrok.train.attempt import Attempt, NodePage, read_attempts
from megagrok.train.files import RunFiles

_TAIL_BYTES = 1 << 16
_CODES = {
    0: "done",
    2: "a configuration that cannot run",
    3: "data that cannot be used",
    4: "a checkpoint that cannot be used",
    5: "a machine that lacks something",
    70: "a bug, a loss that is not finite, or no progress",
    75: "a rank or a node that died or hung",
    76: "asked to stop, and saved",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """A run as its folder and Slurm show it now."""

    files: RunFiles
    lines: list[Line]
    attempt: Attempt | None
    job: int | None
    state: JobState | None
    saved_step: int | None


def look(what: str) -> Seen:
    """The run of a folder or of a job. Raises ConfigError if it is neither, MachineError if Slurm is silent."""
    files = RunFiles(_root_of(what))
    lines = read_journal(files)
    attempts = read_attempts(files.root)
    if not lines and not attempts:
        raise CheckpointError(f"{files.root} has no run of Slurm's in it: no supervise.jsonl and no attempts")
    newest = newest_submission(lines)
    job = None if newest is None else newest.job
    state = None
    if job is not None:
        try:
            state = job_state(job, environment())
        except MachineError:
            state = None
    return Seen(files, lines, attempts[-1] if attempts else None, job, state, newest_saved(files))


def newest_saved(files: RunFiles) -> int | None:
    """Step of the newest checkpoint that is committed; not whether its bytes are sound."""
    steps = [path.parent.name.removeprefix("step-") for path in files.checkpoints.glob("step-*/COMMIT.json")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def status(what: str) -> str:
    """How the run stands, in a few lines."""
    seen = look(what)
    steps, tokens = _progress(seen.files)
    recent = since_submission(seen.lines)
    failures = sum(line.event == "decided" and line.facts.get("action") in ("restart", "successor") for line in recent)
    jobs = {line.job for line in recent if line.event == "submitted"}
    requeues = sum(line.restart > 0 for line in recent if line.event == "started")
    text = [f"{seen.files.root.name}: {_headline(seen)}"]
    text.append(f"  step        {_furthest(seen)} of {steps or '?'}{f', {tokens:,.0f} tokens/s' if tokens else ''}")
    text.append(f"  saved       {'nothing yet' if seen.saved_step is None else f'step {seen.saved_step}'}")
    text.append(f"  heartbeat   {_heartbeat(seen.attempt)}")
    text.append(f"  starts      {0 if seen.attempt is None else seen.attempt.generation}, in {len(jobs)} job(s)")
    text.append(f"  restarts    {failures} after failures, {requeues} after requeues")
    return "\n".join(text)


def why(what: str) -> str:
    """Exactly five lines: what ended it, who was first, where, what was saved, what to type next."""
    seen = look(what)
    ended = _last_end(seen)
    code = ended.exit_code
    decided = next((line for line in reversed(seen.lines) if line.event == "decided"), None)
    outcome = "" if decided is None or code == 0 else f"; then: {decided.text}"
    meaning = "no exit code" if code is None else f"exit code {code}, {_CODES.get(code, 'not one of ours')}"
    has_begun = any(line.event in ("attempt", "ended") for line in seen.lines) or seen.attempt is not None
    if not has_begun:
        meaning = "nothing has been started yet" if decided is None else "nothing was started"
    elif decided is not None and decided.facts.get("action") == "stop":
        # 70 for a run that gets no further; 0, of one that was cancelled, says nothing about the run.
        code = decided.number("code") or code
    if _is_running(seen):
        before = f"; before that, {meaning}{outcome}" if any(line.event == "ended" for line in seen.lines) else ""
        begun = next(line for line in reversed(seen.lines) if line.event == "attempt")
        meaning, outcome = f"it runs: start {1 + (begun.number('after') or 0)}{before}", ""
    first = f"{ended.who}: {ended.message}" if ended.who else ended.message or "nobody failed"
    where = "no rank had begun" if ended.step is None and not ended.furthest_step else _where(ended)
    redo = max(0, (ended.furthest_step or 0) - (seen.saved_step or 0))
    saved = "nothing" if seen.saved_step is None else f"step {seen.saved_step} in {seen.files.checkpoints}"
    lines = [
        f"ended  {meaning}{outcome}",
        f"first  {first}",
        f"where  {where}",
        f"saved  {saved}{f'; up to {redo} step(s) are done again' if redo and code != 0 else ''}",
        f"next   {_next(seen, code)}",
    ]
    return "\n".join(" ".join(line.split("\n")[0].rstrip().splitlines())[:400] for line in lines)


def logs(what: str, rank: int | None) -> str:
    """The end of the job's log, or of a rank's in its newest start. Raises ConfigError if there is none."""
    seen = look(what)
    if rank is None:
        paths = sorted((seen.files.root / "logs").glob("job-*.log"), key=lambda path: path.stat().st_mtime)
    else:
        paths = sorted((seen.files.root / "attempts").glob(f"*/rank-{rank:05d}.log"))
    if not paths:
        raise ConfigError(f"{seen.files.root} has no log of {'a job' if rank is None else f'rank {rank}'} yet")
    with paths[-1].open("rb") as file:
        file.seek(max(0, paths[-1].stat().st_size - _TAIL_BYTES))
        tail = file.read().decode("utf-8", errors="replace")
    return f"==> {paths[-1]} <==\n{tail}"


def cancel(what: str) -> str:
    """Mark the run as cancelled, so that no supervisor requeues it, and end its job. Raises MachineError."""
    seen = look(what)
    job = seen.job or 0
    write_line(seen.files, "cancelled", "cancelled by a person", job=job, facts={})
    if seen.state is None or seen.state.is_over:
        return f"{seen.files.root.name}: cancelled; no job of it is in the queue"
    # Waiting, it just leaves the queue. Running, it is asked to save first: the supervisor sees the mark and stops.
    if seen.state.state == "RUNNING":
        answer = call(["scancel", "--batch", "--signal=USR1", str(job)], environment=environment())
        text = f"job {job} saves and ends; to end it at once: scancel {job}"
    else:
        answer = call(["scancel", str(job)], environment=environment())
        text = f"job {job} has left the queue"
    if not answer.is_good:
        raise MachineError(f"scancel {job}: {answer.sentence}")
    return f"{seen.files.root.name}: cancelled; {text}"


def _root_of(what: str) -> Path:
    path = Path(what)
    if path.is_dir() or not what.isdecimal():
        if not path.is_dir():
            raise ConfigError(f"{what} is neither the folder of a run nor the number of a job")
        return path
    state = job_state(int(what), environment())
    if state is None:
        raise ConfigError(f"Slurm has forgotten job {what}: give the folder of its run instead")
    if not state.comment.startswith("/"):
        raise ConfigError(f"job {what} is not of megagrok, or has not started: it names no folder of a run")
    return Path(state.comment)


def _headline(seen: Seen) -> str:
    if seen.state is None:
        job = "no job of it is known to Slurm" if seen.job is None else f"job {seen.job} is not known to Slurm any more"
        decided = next((line for line in reversed(seen.lines) if line.event == "decided"), None)
        return job if decided is None else f"{decided.text} ({job})"
    where = f" on {seen.state.nodes}" if seen.state.nodes not in ("", "(null)") else ""
    why_ = f" ({seen.state.reason})" if seen.state.state == "PENDING" else ""
    return f"job {seen.job} is {seen.state.state.lower()}{where}{why_}"


def _is_running(seen: Seen) -> bool:
    """Whether launchers are at work, as far as the supervisor and Slurm know."""
    last = next((line for line in reversed(seen.lines) if line.event in ("attempt", "ended")), None)
    is_begun = last is not None and last.event == "attempt"
    return is_begun and seen.state is not None and seen.state.state == "RUNNING"


def _progress(files: RunFiles) -> tuple[int | None, float | None]:
    """Steps of the whole run, and tokens per second of the newest step."""
    steps = None
    if files.config.exists():
        try:
            steps = load_config(files.config).config.train.steps
        except MegagrokError:
            steps = None
    newest = _last_record(files)
    tokens = newest.get("tokens_per_second")
    return steps, float(tokens) if isinstance(tokens, int | float) else None


def _last_record(files: RunFiles) -> Mapping[str, object]:
    if not files.metrics.exists():
        return {}
    with files.metrics.open("rb") as file:
        file.seek(max(0, files.metrics.stat().st_size - _TAIL_BYTES))
        texts = file.read().decode("utf-8", errors="replace").splitlines()
    for text in reversed(texts):
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return record
    return {}


def _furthest(seen: Seen) -> int:
    step = _last_record(seen.files).get("step")
    return step if isinstance(step, int) else 0


def _heartbeat(attempt: Attempt | None) -> str:
    if attempt is None or not attempt.nodes:
        return "none yet"
    page: NodePage = min(attempt.nodes, key=lambda page: page.at)
    age = max(0.0, time.time() - page.at)
    slowest = max(page.ranks, key=lambda rank: rank.age_seconds, default=None)
    if all(page.ending is not None for page in attempt.nodes):
        return f"none, start {attempt.generation} has ended"
    doing = "" if slowest is None else f", rank {slowest.rank} in phase {slowest.phase} at step {slowest.step}"
    return f"{age:.0f} s ago from {page.host}{doing}"


def _last_end(seen: Seen) -> Ended:
    """The end of the newest attempt: as the supervisor wrote it down, or else as the pages say."""
    written = next((line for line in reversed(seen.lines) if line.event in ("ended", "attempt")), None)
    if written is not None and written.event == "attempt" and _is_running(seen):
        written = next((line for line in reversed(seen.lines) if line.event == "ended"), None)
        if written is None:
            return Ended(None, _furthest(seen), seen.saved_step, (), "", None, _furthest(seen), "nobody has failed")
    if written is not None and written.event == "ended":
        texts = {
            name: value if isinstance(value := written.facts.get(name), str) else "" for name in ("who", "message")
        }
        phase = written.facts.get("phase")
        return Ended(
            exit_code=written.number("exit_code"),
            furthest_step=written.number("furthest_step") or 0,
            saved_step=written.number("saved_step"),
            suspects=tuple(written.words("suspects")),
            who=texts["who"],
            phase=phase if isinstance(phase, str) else None,
            step=written.number("step"),
            message=texts["message"],
        )
    return ended_of(seen.attempt, [] if written is None else written.words("nodes"), None)


def _where(ended: Ended) -> str:
    step = ended.furthest_step if ended.step is None else ended.step
    return f"step {step}" + (f", phase {ended.phase}" if ended.phase else "")


def _next(seen: Seen, code: int | None) -> str:
    """What a person types now, if anything."""
    root = seen.files.root
    decided = next((line for line in reversed(seen.lines) if line.event == "decided"), None)
    goes_on = decided is not None and decided.facts.get("action") in ("requeue", "restart", "successor")
    if seen.state is not None and not seen.state.is_over and (seen.state.state != "COMPLETING" or goes_on):
        state = "going back to the queue" if seen.state.state == "COMPLETING" else seen.state.state.lower()
        return f"nothing, job {seen.job} is {state}: megagrok slurm status {root}"
    newest = newest_submission(seen.lines)
    again = "megagrok resume " + shlex.quote(str(root)) if newest is None else shlex.join(newest.words("command"))
    if code == 0:
        return f"megagrok generate {root}"
    if code in (2, 3, 4, 5):
        return f"correct what the second line says, then {again}"
    if code == 70:
        return f"megagrok slurm logs {root}, then {again}"
    return again
