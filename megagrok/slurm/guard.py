"""Who watches the supervisor: a small process on another node of the job.

Needed where a job outlives a lost node (--no-kill, for its spares): if the lost node is the first one, the supervisor
is gone and Slurm sees nothing wrong with a job that does nothing until its time limit. Not a second supervisor: all it
does is to hand the job back to the queue, where it starts anew.
"""

import signal
import sys
import time

from megagrok.slurm.environment import environment
from megagrok.slurm.queue import call, down_nodes

ASK_SECONDS = 10.0


def guard(job: int, head: str) -> None:
    """Return when `head` was lost and the job is requeued; leave quietly when the supervisor says so (SIGUSR1)."""
    signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(0))
    while True:
        time.sleep(ASK_SECONDS)
        if down_nodes([head], environment()):
            answer = call(["scontrol", "requeue", str(job)], environment=environment())
            print(f"megagrok guard: {head} is down, and the supervisor with it; job {job} goes back to the queue")
            if answer.is_good:
                return
            print(f"megagrok guard: Slurm does not requeue it, trying again: {answer.sentence}")
