"""One run under fault: its lives one after the other, what they left, and how long it took to get going again."""

import json
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from megagrok.config import RunConfig
from megagrok.drill.life import Life
from megagrok.drill.oracle import Losses, newest_saved
from megagrok.errors import EXIT_PREEMPTED, EXIT_TRANSIENT
from megagrok.train.beginning import Inject
from megagrok.train.files import RunFiles

_TAIL_BYTES = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One fault, injected once."""

    fault: str
    what: str
    """Who was hit, when, and how."""
    status: int | None = None
    """How the life that was hit ended; None if it went on."""
    end_seconds: float | None = None
    """From the fault to the end of that life."""
    recovery_seconds: float | None = None
    """From the fault to the first step beyond those made before it; None if there was none."""
    steps_redone: int = 0
    problems: tuple[str, ...] = ()
    """What broke a promise, in words."""


@dataclass(slots=True)
class Scene:
    """The run `run`, and what happened to it. `steps` of a run that needs none of it cost `step_seconds` each."""

    run: RunConfig
    random: random.Random
    output: Path
    step_seconds: float
    inject: "Inject | None" = None
    losses: Losses = field(default_factory=Losses)
    rounds: list[Round] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_lives: int = 0

    @property
    def files(self) -> RunFiles:
        """The run's folder."""
        return RunFiles.of(self.run)

    def live(self) -> Life:
        """Start the run, or start it again."""
        self.num_lives += 1
        return Life(self.run, output=self.output, inject=self.inject)

    def last_step(self) -> int:
        """The last step in metrics.jsonl, read from its end; 0 if there is none."""
        try:
            with self.files.metrics.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(max(0, size - _TAIL_BYTES))
                lines = stream.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") == "step":
                return int(record["step"])
        return 0

    def is_at(self, life: Life, step: int) -> bool:
        """Wait until a step is done; False if the life ended before."""
        return life.until(lambda: self.last_step() >= step)

    def end_of(self, life: Life) -> int:
        """Wait for a life's end, and look at what it left: its losses, and that nobody survived it (O6)."""
        status = life.wait()
        self.losses.take(self.files)
        deadline = time.monotonic() + 5
        while (survivors := life.survivors()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if survivors:
            self.problems.append(f"O6: {len(survivors)} processes outlived a life that ended with {status}")
            life.end()
        return status

    def hit(self, life: Life, fault: str, what: str, at: float, saved_before: int, allowed: tuple[int, ...]) -> None:
        """Note a fault that was injected at the time `at` and has to end the life with a status of `allowed`."""
        step_before = self.last_step()
        status = self.end_of(life)
        ended = time.monotonic()
        problems = []
        if status not in allowed:
            problems.append(
                f"O5: ended with {status}, {' or '.join(map(str, allowed))} was promised:\n{life.said[-2000:]}"
            )
        if newest_saved(self.files) < saved_before:
            problems.append(f"O4: step {saved_before} was saved, {newest_saved(self.files)} is the newest now")
        furthest = max([step_before, self.last_step()])
        self.rounds.append(
            Round(
                fault=fault,
                what=what,
                status=status,
                end_seconds=ended - at,
                steps_redone=furthest - newest_saved(self.files),
                problems=tuple(problems),
            )
        )

    def recover(self, at: float) -> Life:
        """Start again after the last round, whose fault came at the time `at`; returns when it has got further."""
        furthest = max(self.losses.by_step, default=0)
        life = self.live()
        life.until(lambda: self.last_step() > furthest or self.last_step() == self.run.train.steps)
        self.rounds[-1] = replace(self.rounds[-1], recovery_seconds=time.monotonic() - at)
        return life

    def finish(self, life: Life) -> None:
        """Let a life come to the end of the run."""
        status = self.end_of(life)
        if status != 0:
            self.problems.append(
                f"O5: the run should have come to its end, and ended with {status}:\n{life.said[-3000:]}"
            )


DIED = (EXIT_TRANSIENT, -9)
STOPPED = (EXIT_PREEMPTED,)
