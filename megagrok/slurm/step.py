"""One srun: a task on each of some nodes, started, watched, asked to stop, and ended if it does not end.

Not what the tasks do. What they print goes to the job's log, labelled with the node's number; how they ended is read
elsewhere, because srun's own exit code is the highest of all nodes' or that of a signal.
"""

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from megagrok.slurm.script import Submission

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0
_QUICK_SECONDS = 3.0


def srun_command(
    submission: Submission,
    nodes: Sequence[str],
    command: Sequence[str],
    *,
    tasks_per_node: int = 1,
    on_host: bool = False,
) -> list[str]:
    """srun with tasks on each of `nodes`, in the container if the cluster file has one and they are not for the host.

    overlap: a step that a dead node keeps from ending must not keep the next one from starting.  No binding: a launcher
    forks ranks, which need all of the node's cores.  Tasks are not killed because another has ended: launchers agree
    on that among themselves, and rank 0 still writes the report.
    """
    options = [
        f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(nodes)}", "--overlap", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--label",
    ]  # fmt: skip
    if (container := submission.cluster.container) is not None and not on_host:
        mounts = ",".join(f"{mount.source}:{mount.target}" for mount in container.mounts)
        options += [f"--container-image={container.image}", "--no-container-mount-home"]
        options += [f"--container-workdir={submission.folder}", *([f"--container-mounts={mounts}"] if mounts else [])]
    return ["srun", *options, *command]


def megagrok_command(submission: Submission, *arguments: str) -> list[str]:
    """megagrok as the nodes have it."""
    return [submission.rank_python, "-u", "-m", "megagrok", *arguments]


@dataclass(slots=True)
class Step:
    """A running srun. `stop` may be called by a signal handler's flag any number of times; it acts once."""

    process: subprocess.Popen[str]
    _asked: bool = field(default=False, init=False)

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> "Step":
        """Its output is this process's own: the job's log."""
        return cls(subprocess.Popen(list(command), stdin=subprocess.DEVNULL, env=dict(environment), text=True))

    @property
    def is_over(self) -> bool:
        """Whether srun has ended."""
        return self.process.poll() is not None

    def ask_to_stop(self) -> None:
        """Pass Slurm's warning on to all tasks. Once: a second signal would end them without a save."""
        if not self._asked and self.process.poll() is None:
            self._asked = True
            self.process.send_signal(signal.SIGUSR1)

    def wait(self, on_look: Callable[[], bool]) -> int:
        """srun's exit code. `on_look` is called several times a second, and returns True when it has waited enough."""
        while (code := self.process.poll()) is None:
            if on_look():
                self.end()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=_POLL_SECONDS)
        return code

    def dismiss(self) -> None:
        """Ask for the end and see to it, where nothing is to be saved."""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_QUICK_SECONDS)
        if self.process.poll() is None:
            self.end()

    def end(self) -> None:
        """End the step, then srun itself: a task on a dead node never answers."""
        self.process.terminate()
        try:
            self.process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def collect_lines(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    limit_seconds: float,
    take: Callable[[str, float], bool],
) -> str:
    """Run srun and hand each line of its output to `take`, with its time of arrival; what was not taken.

    Ends it after the limit.
    """
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(environment), text=True, errors="replace", bufsize=1,
    )  # fmt: skip
    timer = threading.Timer(limit_seconds, process.terminate)
    last = threading.Timer(limit_seconds + _PATIENCE_SECONDS, process.kill)
    rest = []
    timer.start()
    last.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if not take(line, time.time()):
                rest.append(line)
        process.wait()
    finally:
        timer.cancel()
        last.cancel()
    return "".join(rest)
