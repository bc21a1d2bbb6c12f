"""A drill from its begin to its end: the untouched run, then the same run for each fault, held to the oracle."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megagrok.config import RunConfig
from megagrok.drill.faults import FAULTS
from megagrok.drill.life import Life
from megagrok.drill.oracle import Expected, differences, expect, remains
from megagrok.drill.scene import Round, Scene
from megagrok.drill.subject import make_subject
from megagrok.errors import MachineError
from megagrok.telemetry.metrics_file import read_metrics
from megagrok.train.account import audit_run
from megagrok.train.files import RunFiles

# Steps that a fault needs for itself: to be seen, to be made again, and to show that the run goes on.
_STEPS_PER_ROUND = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fault's run."""

    fault: str
    num_steps: int
    num_lives: int
    wall_seconds: float
    productive_seconds: float
    """What the same steps take when nothing happens."""
    steps_redone: int
    rounds: tuple[Round, ...]
    problems: tuple[str, ...]
    """Every promise that was broken; empty if the run came out as the untouched one."""
    skipped: str | None = None
    """Why the fault could not be injected here."""

    @property
    def effective_time_ratio(self) -> float:
        """Effective training time ratio (ETTR): productive time over all of it."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to drill. `rounds` is how often each fault is injected."""

    faults: Sequence[str]
    rounds: int
    seed: int
    folder: Path


def drill(request: Request, on_trial: Callable[[Trial], None] = lambda trial: None) -> list[Trial]:
    """Run all trials, each in a folder of its own below `request.folder`. Call it from the main thread of a process
    that has used neither torch in parallel nor a GPU."""
    steps = _STEPS_PER_ROUND * request.rounds + 24
    request.folder.mkdir(parents=True, exist_ok=True)
    untouched = make_subject(request.folder, "untouched", steps=steps)
    expected, step_seconds = _live_untouched(untouched, request.folder)
    trials = []
    for name in request.faults:
        trial = _try(name, request, untouched, expected, step_seconds)
        on_trial(trial)
        trials.append(trial)
    return trials


def _live_untouched(run: RunConfig, folder: Path) -> tuple[Expected, float]:
    life = Life(run, output=folder / "untouched.txt")
    if life.wait() != 0:
        raise MachineError(f"the run does not come to its end here even if nobody touches it:\n{life.said}")
    files = RunFiles.of(run)
    seconds = statistics.median(record.step_seconds for record in read_metrics(files.metrics).steps)
    return expect(files, run.train.steps), seconds


def _try(name: str, request: Request, untouched: RunConfig, expected: Expected, step_seconds: float) -> Trial:
    run = replace(untouched, name=name)
    scene = Scene(run, random.Random(f"{request.seed} {name}"), request.folder / f"{name}.txt", step_seconds)
    begun, skipped = time.monotonic(), None
    try:
        FAULTS[name](scene, request.rounds)
    except MachineError as error:
        skipped = str(error)
    wall = time.monotonic() - begun
    problems = [*scene.problems, *(problem for each in scene.rounds for problem in each.problems)]
    if skipped is None:
        if name == "nan":
            # Left-out steps make another run; tests/train holds it to one that leaves out the same steps.
            problems += [*remains(scene.files), *(f"O3: {problem}" for problem in audit_run(scene.files).problems)]
        else:
            problems += differences(scene.files, scene.losses, expected, run.train.steps)
        wanted = 1 if name == "slow" else request.rounds
        if len(scene.rounds) < wanted:
            problems.append(f"only {len(scene.rounds)} of {wanted} rounds fitted into {run.train.steps} steps")
    return Trial(
        fault=name,
        num_steps=run.train.steps,
        num_lives=scene.num_lives,
        wall_seconds=wall,
        productive_seconds=run.train.steps * step_seconds,
        steps_redone=sum(each.steps_redone for each in scene.rounds),
        rounds=tuple(scene.rounds),
        problems=tuple(problems),
        skipped=skipped,
    )
