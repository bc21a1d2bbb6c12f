"""The brain of a job: `megagrok slurm supervise`, in the batch step, on the first node, for as long as the job lasts.

    preflight -> one launcher on each node -> how did it end? -> done, stop, go on here, or back to the queue

Not the training, and not the decision itself (decide.py). It keeps nothing in memory that matters: what was tried is in
the run's folder, so the supervisor of the next job, or of this one after a requeue, goes on where this one was killed.
"""

import dataclasses
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Literal

from megagrok.config.problems import Problem, raise_problems
from megagrok.errors import EXIT_PREEMPTED, MachineError
from megagrok.plan import require_runnable
from megagrok.slurm.bandwidth import slow_nodes
from megagrok.slurm.checks import layout_problems
from megagrok.slurm.decide import Action, Decision, Ended, Situation, decide, ended_of
from megagrok.slurm.environment import Job, environment, this_job
from megagrok.slurm.journal import (
    Event,
    Line,
    Value,
    is_cancelled,
    newest_submission,
    read_journal,
    since_submission,
    write_line,
)
from megagrok.slurm.preflight import NodeFacts, judge, make_probe, read_answer, read_bandwidth, unseen
from megagrok.slurm.queue import call, down_nodes, job_state, node_address, node_names
from megagrok.slurm.script import Submission, render, word_problems
from megagrok.slurm.step import Step, collect_lines, megagrok_command, srun_command
from megagrok.slurm.submit import hand_in, keep_script, submit_command
from megagrok.train.attempt import Attempt, NodePage, generations, read_attempts

# After the first launcher has failed, the others get this long to notice, tell and leave.
LINGER_SECONDS = 60.0
# A page is written every 2 s. Network file systems show it late, and a node may stall for a while.
SILENT_SECONDS = 120.0
ASK_SECONDS = 10.0
_LOOK_SECONDS = 2.0
# A requeue ends this process; if Slurm is slow, it waits to be ended rather than end first.
_REQUEUE_SECONDS = 30.0


def supervise(submission: Submission) -> int:
    """Bring the run to its end, or to where somebody else goes on; the exit code of the job.

    Raises ConfigError and MachineError for what no restart can cure.
    """
    job = this_job()
    require_runnable(submission.loaded, submission.ranks)
    problems = word_problems(submission) + layout_problems(submission)
    if job.is_array:
        problems.append(
            Problem("", "this job is an array, whose tasks would all write to one run. Fix: one job per run")
        )
    if job.num_nodes < submission.nodes:
        text = (
            f"the job has {job.num_nodes} nodes, the layout needs {submission.nodes}. Fix: sbatch -N {submission.nodes}"
        )
        problems.append(Problem("parallel", text))
    state = job_state(job.id, environment())
    if state is not None and not state.is_requeueable:
        text = "this job cannot be requeued, and the run is to come back by itself. Fix: sbatch --requeue"
        problems.append(Problem("", text))
    raise_problems(problems, str(submission.config_path))
    keep_script(submission, render(submission))
    return Supervisor(submission, job).run()


class Supervisor:
    """One job's supervisor. Constructed once, by `supervise`."""

    def __init__(self, submission: Submission, job: Job) -> None:
        self.submission, self.job, self.files = submission, job, submission.files
        self.environment = {**environment(), **{each.name: each.value for each in submission.cluster.environment}}
        self.nodes = node_names(job.node_list, self.environment)
        self.is_asked_to_stop = False
        self.is_told_to_end = False
        self._guard: Step | None = None

    def run(self) -> int:
        """Attempt after attempt."""
        try:
            return self._run()
        finally:
            if self._guard is not None:
                self._guard.dismiss()

    def _run(self) -> int:
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        # Slurm sends it to every process of a job that it ends; the launchers have it already.
        signal.signal(signal.SIGTERM, self._note)
        # So that `status JOBID` finds the run of a job that was not submitted by megagrok.
        call(["scontrol", "update", f"JobId={self.job.id}", f"Comment={self.files.root}"], environment=self.environment)
        lines = read_journal(self.files)
        if not any(line.event == "submitted" and line.job == self.job.id for line in lines):
            self._write(
                "submitted", f"submitted as job {self.job.id}", by="person", command=submit_command(self.submission)
            )
        self._write("started", f"on {', '.join(self.nodes)}", nodes=self.nodes)
        self._account_for_the_last()
        while True:
            if (decision := self._stop_before()) is None:
                fit = self._preflight()
                decision = self._without_enough(fit) if len(fit) < self.submission.nodes else None
            if decision is None:
                self._post_guard(fit)
                decision = self._attempt(fit[: self.submission.nodes])
            if decision.action != "restart":
                return self._carry_out(decision)

    def _stop_before(self) -> Decision | None:
        """Reasons not to start anything."""
        nothing = Ended(None, 0, None, (), "", None, None, "")
        now = self._situation(nothing)
        if now.is_cancelled or now.overtaken_by is not None:
            return self._decided(decide(now))
        if self.is_asked_to_stop:
            ended = Ended(EXIT_PREEMPTED, 0, None, (), "", None, None, "asked to stop before anything was started")
            return self._decided(decide(self._situation(ended)))
        return None

    def _post_guard(self, fit: list[str]) -> None:
        """Have another node watch this one, if Slurm would let the job live on without it: with spares, --no-kill."""
        others = [node for node in fit if node != self.nodes[0]]
        is_needed = self.submission.cluster.spare_nodes > 0 and (self._guard is None or self._guard.is_over)
        if is_needed and others:
            command = [
                self.submission.python,
                "-u",
                "-m",
                "megagrok",
                "slurm",
                "guard",
                str(self.job.id),
                self.nodes[0],
            ]
            arguments = srun_command(self.submission, others[-1:], command, on_host=True)
            self._guard = Step.start(arguments, self.environment)

    def _attempt(self, nodes: list[str]) -> Decision:
        """Start the launchers, wait for their end, and decide."""
        before = max(generations(self.files.root), default=0)
        address = node_address(nodes[0], self.environment)
        tried = sum(line.event == "attempt" and line.job == self.job.id for line in read_journal(self.files))
        port = 20000 + (self.job.id + 101 * tried) % 20000
        self._write("attempt", f"starting on {', '.join(nodes)}", nodes=nodes, after=before)
        command = megagrok_command(self.submission, "train", *self.submission.train_arguments)
        variables = {**self.environment, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        step = Step.start(srun_command(self.submission, nodes, command), variables)
        patience = Patience(self, step, nodes, before)
        code = step.wait(patience.look)
        ended = ended_of(self._attempt_after(before), nodes, code, patience.lost or down_nodes(nodes, self.environment))
        self._write_end(ended, before)
        return self._decided(decide(self._situation(ended)))

    def _preflight(self) -> list[str]:
        """The nodes that are fit, those without a past first."""
        lines = read_journal(self.files)
        here = [line for line in lines if line.job == self.job.id and line.restart == self.job.restart]
        failed_here = {node for line in here for node in line.words("suspects")}
        failed_before = {node for line in since_submission(lines) for node in line.words("suspects")}
        # A step that includes a dead node does not start.
        gone = {*failed_here, *down_nodes(self.nodes, self.environment, or_silent=True)}
        candidates = [node for node in self.nodes if node not in gone]
        limits = self.submission.cluster.preflight
        token = f"{self.job.id}-{secrets.token_hex(4)}"
        answers: dict[str, NodeFacts] = {}
        skews: dict[str, float] = {}

        def take(line: str, arrived_at: float) -> bool:
            facts = read_answer(line)
            if facts is not None:
                answers[facts.node] = facts
                skews[facts.node] = facts.at - arrived_at
            return facts is not None

        rest = ""
        try:
            probe = make_probe(self.files.root, token)
        except OSError as error:
            raise MachineError(f"{self.files.root} cannot be written: {error.strerror}") from error
        try:
            if candidates:
                command = megagrok_command(self.submission, "slurm", "preflight", str(probe), token)
                arguments = srun_command(self.submission, candidates, command)
                rest = collect_lines(arguments, self.environment, limit_seconds=limits.timeout_seconds, take=take)
            lost = unseen(probe, [node for node in candidates if node in answers], token)
        finally:
            shutil.rmtree(probe, ignore_errors=True)
        unfit = judge(
            answers, skews, candidates, gpus_per_node=self.submission.cluster.gpus_per_node,
            needs_locked_memory=self.submission.cluster.gpus_per_node > 0 and self.submission.nodes > 1, limits=limits,
        )  # fmt: skip
        for node in lost:
            unfit.setdefault(node, []).append(f"what it writes in {self.files.root} does not arrive here")
        fit = [node for node in candidates if node not in unfit]
        if limits.min_bandwidth_gb_per_second and len(fit) >= max(2, self.submission.nodes):
            least = limits.min_bandwidth_gb_per_second
            unfit |= slow_nodes(fit, self.submission.nodes, self._bandwidth, least)
            fit = [node for node in fit if node not in unfit]
        # A stable sort: Slurm's order among equals.
        fit.sort(key=lambda node: node in failed_before)
        fit = self._in_slurms_order(fit[: self.submission.nodes]) + fit[self.submission.nodes :]
        words = [f"{node}: {'; '.join(reasons)}" for node, reasons in unfit.items()]
        if rest.strip() and not answers:
            words.append(rest.strip()[-500:])
        left_out = f", left out: {' | '.join(words)}" if words else ""
        self._write(
            "preflight", f"{len(fit)} of {len(self.nodes)} nodes are fit{left_out}", unfit=sorted(unfit), fit=fit
        )
        return fit

    def _in_slurms_order(self, nodes: Sequence[str]) -> list[str]:
        """As Slurm will number them, whatever order srun is given: task 0, whom the others meet, is on the first."""
        return [node for node in self.nodes if node in nodes]

    def _bandwidth(self, pair_or_all: Sequence[str], number: int) -> float | None:
        """GB/s of an all-reduce over all GPUs of the nodes, or one process each; None if they did not meet."""
        nodes = self._in_slurms_order(pair_or_all)
        found: list[float] = []

        def take(line: str, arrived_at: float) -> bool:
            if (value := read_bandwidth(line)) is not None:
                found.append(value)
            return value is not None

        address, port = node_address(nodes[0], self.environment), 20000 + (self.job.id + 997 + number) % 20000
        variables = {**self.environment, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        command = srun_command(
            self.submission, nodes, megagrok_command(self.submission, "slurm", "bandwidth"),
            tasks_per_node=max(1, self.submission.cluster.gpus_per_node),
        )  # fmt: skip
        limit_seconds = self.submission.cluster.preflight.timeout_seconds
        rest = collect_lines(command, variables, limit_seconds=limit_seconds, take=take)
        if not found:
            self._say(f"no bandwidth between {', '.join(nodes)}: {rest.strip()[-500:]}")
        return found[0] if found else None

    def _without_enough(self, fit: list[str]) -> Decision:
        """Preflight has left too few nodes."""
        unfit = tuple(node for node in self.nodes if node not in fit)
        ended = Ended(None, self._furthest(), None, unfit, " and ".join(unfit), "start", None, "not fit for a start")
        if not fit and len(self.nodes) > 1:
            text = "no node is fit: that is the site or the cluster file, not the nodes"
            return self._decided(Decision("stop", MachineError.exit_code, text))
        # Nobody died: that no step was made says nothing about the run.
        now = dataclasses.replace(self._situation(ended), deaths=(), usable_nodes=len(fit))
        return self._decided(decide(now))

    def _situation(self, ended: Ended) -> Situation:
        lines = read_journal(self.files)
        recent = since_submission(lines)
        newest = newest_submission(lines)
        here = [line for line in lines if line.job == self.job.id and line.restart == self.job.restart]
        gone = {*ended.suspects, *(node for line in here for node in line.words("suspects"))}
        deaths = [line for line in recent if line.event == "ended" and line.facts.get("is_death")]
        # The newest death is the one to decide about.
        earlier = [step for line in deaths if (step := line.number("furthest_step")) is not None]
        return Situation(
            ended=ended,
            deaths=earlier[:-1] if ended.is_death else earlier,
            restarts=sum(
                line.event == "decided" and line.facts.get("action") in ("restart", "successor") for line in recent
            ),
            max_restarts=self.submission.cluster.max_restarts,
            slurm=self._slurm_says(),
            is_cancelled=is_cancelled(lines),
            overtaken_by=newest.job if newest is not None and newest.job != self.job.id else None,
            usable_nodes=len([node for node in self.nodes if node not in gone]),
            needed_nodes=self.submission.nodes,
        )

    def _slurm_says(self) -> Literal["running", "requeued", "ended"]:
        try:
            state = job_state(self.job.id, self.environment)
        except MachineError as error:
            print(f"megagrok: {error}; the job is taken to be running", file=sys.stderr)
            return "running"
        if state is None or state.state == "RUNNING":
            return "running"
        return "requeued" if state.restarts > self.job.restart else "ended"

    def _account_for_the_last(self) -> None:
        """Write down the end of an attempt whose supervisor died with it."""
        lines = read_journal(self.files)
        last = next((line for line in reversed(lines) if line.event in ("attempt", "ended")), None)
        if last is None or last.event == "ended":
            return
        before = last.number("after") or 0
        nodes = last.words("nodes")
        ended = ended_of(self._attempt_after(before), nodes, None, down_nodes(nodes, self.environment))
        self._write_end(ended, before, job=last.job, restart=last.restart)

    def _attempt_after(self, generation: int) -> Attempt | None:
        """The newest start after that one. Asked every few seconds, so it reads no page of the starts before."""
        return next(reversed(read_attempts(self.files.root, after=generation)), None)

    def _furthest(self) -> int:
        return max((attempt.furthest_step for attempt in read_attempts(self.files.root)), default=0)

    def _carry_out(self, decision: Decision) -> int:
        """The last act of this job."""
        action: Action = decision.action
        if action == "successor" and self._submit_successor():
            return decision.exit_code
        if action in ("successor", "requeue"):
            answer = call(["scontrol", "requeue", str(self.job.id)], environment=self.environment)
            if answer.is_good:
                self._wait_to_be_ended()
                return 0
            self._say(f"Slurm does not requeue the job: {answer.sentence}")
            if action == "requeue" and self._submit_successor():
                return 0
        return decision.exit_code

    def _wait_to_be_ended(self) -> None:
        deadline = time.monotonic() + _REQUEUE_SECONDS
        while not self.is_told_to_end and time.monotonic() < deadline:
            time.sleep(0.1)

    def _submit_successor(self) -> bool:
        lines = since_submission(read_journal(self.files))
        bad = sorted({node for line in lines for node in (*line.words("suspects"), *line.words("unfit"))})
        try:
            job = hand_in(self.submission, by="job", exclude=bad, after=self.job.id)
        except MachineError as error:
            self._say(str(error))
            return False
        without = f" without {', '.join(bad)}" if bad else ""
        write_line(
            self.files, "submitted", f"job {self.job.id} submitted job {job}{without}", job=job,
            facts={"by": "job", "exclude": bad, "command": submit_command(self.submission)},
        )  # fmt: skip
        self._say(f"job {job} goes on{without}")
        return True

    def _decided(self, decision: Decision) -> Decision:
        self._write("decided", decision.text, action=decision.action, code=decision.exit_code)
        return decision

    def _write_end(self, ended: Ended, before: int, *, job: int | None = None, restart: int | None = None) -> None:
        code = "no exit code" if ended.exit_code is None else f"exit code {ended.exit_code}"
        who = f", {ended.who} first" if ended.who else ""
        facts: dict[str, Value] = {
            "exit_code": ended.exit_code, "is_death": ended.is_death, "furthest_step": ended.furthest_step,
            "saved_step": ended.saved_step, "suspects": list(ended.suspects), "after": before, "who": ended.who,
            "phase": ended.phase, "step": ended.step, "message": ended.message[:500],
        }  # fmt: skip
        first_line = ended.message.partition("\n")[0]
        text = f"{code}{who}, at step {ended.furthest_step}: {first_line}".rstrip(": ")
        line = write_line(
            self.files, "ended", text, job=job or self.job.id,
            restart=self.job.restart if restart is None else restart, facts=facts,
        )  # fmt: skip
        self._say(line.text)

    def _write(self, event: Event, text: str, **facts: Value) -> Line:
        self._say(text)
        return write_line(self.files, event, text, job=self.job.id, restart=self.job.restart, facts=facts)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        print(f"megagrok {stamp} job {self.job.id} restart {self.job.restart}: {text}", flush=True)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.is_asked_to_stop = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_told_to_end = True


class Patience:
    """How long launchers are waited for that are left over, or on a lost node; and how Slurm's warning gets to them."""

    def __init__(self, supervisor: Supervisor, step: Step, nodes: Sequence[str], before: int) -> None:
        self._supervisor, self._step, self._nodes, self._before = supervisor, step, nodes, before
        self._looked_at = self._asked_at = time.monotonic()
        self._ended_at: float | None = None
        self._heard: dict[int, tuple[float, float]] = {}
        self.lost: list[str] = []
        """Nodes that are gone."""

    def look(self) -> bool:
        """Whether the launchers that have not ended will not."""
        if self._supervisor.is_asked_to_stop:
            self._step.ask_to_stop()
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return False
        self._looked_at = now
        attempt = self._supervisor._attempt_after(self._before)
        pages = () if attempt is None else attempt.nodes
        # Not after a good end: rank 0 takes its time for the report.
        if self._ended_at is None and any(page.ending is not None and page.ending.exit_code != 0 for page in pages):
            self._ended_at = now
        if now - self._asked_at > ASK_SECONDS:
            self._asked_at = now
            self.lost = down_nodes(self._nodes, self._supervisor.environment) or self._silent(pages, now)
        return bool(self.lost) or (self._ended_at is not None and now - self._ended_at > LINGER_SECONDS)

    def _silent(self, pages: Sequence[NodePage], now: float) -> list[str]:
        """Nodes whose page has stood still for long while others are written. Clocks of nodes are not compared."""
        for page in pages:
            at, _ = self._heard.get(page.node, (0.0, 0.0))
            if at != page.at or page.ending is not None:
                self._heard[page.node] = (page.at, now)
        ages = {node: now - heard for node, (_, heard) in self._heard.items()}
        if min(ages.values(), default=0.0) > ASK_SECONDS:
            return []  # nobody writes: that is the file system, or this node
        return [self._nodes[node] for node, age in ages.items() if age > SILENT_SECONDS and node < len(self._nodes)]
