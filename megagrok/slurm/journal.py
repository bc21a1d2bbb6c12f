"""RUN/supervise.jsonl: what was submitted, tried, seen and decided, one line each, over all jobs of a run.

Not the training's own records (megagrok/train/attempt.py). Append only: a line is written and synced before the
decision that it tells of is carried out, so a supervisor that was killed leaves no mystery.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagrok.train.files import RunFiles

Event = Literal["submitted", "started", "preflight", "attempt", "ended", "decided", "cancelled"]
Value = str | int | float | bool | None | list[str]


@dataclass(frozen=True, slots=True)
class Line:
    """One event. `job` is 0 where no job is meant; `facts` depend on the event."""

    at: float
    event: str
    job: int
    restart: int
    text: str
    facts: dict[str, Value]

    def number(self, name: str) -> int | None:
        """A fact that is a whole number, if it is there."""
        value = self.facts.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def words(self, name: str) -> list[str]:
        """A fact that is a list of words; empty if it is not there."""
        value = self.facts.get(name)
        return value if isinstance(value, list) else []


def journal_path(files: RunFiles) -> Path:
    """Where the lines are."""
    return files.root / "supervise.jsonl"


def write_line(
    files: RunFiles, event: Event, text: str, *, job: int, restart: int = 0, facts: dict[str, Value]
) -> Line:
    """Append an event, and return when it is on disk."""
    line = Line(time.time(), event, job, restart, text, facts)
    path = journal_path(files)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"at": line.at, "event": event, "job": job, "restart": restart, "text": text, **facts}
    # One write: lines of two jobs that overlap for a moment do not mix.
    data = (json.dumps(plain) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return line


def read_journal(files: RunFiles) -> list[Line]:
    """All events in order; a line that a crash tore is passed over."""
    try:
        texts = journal_path(files).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    lines = []
    for text in texts:
        try:
            plain = json.loads(text)
            head = {name: plain.pop(name) for name in ("at", "event", "job", "restart", "text")}
            lines.append(Line(**head, facts=plain))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return lines


def newest_submission(lines: Sequence[Line]) -> Line | None:
    """The last time that somebody, or a failing job, submitted the run."""
    return next((line for line in reversed(lines) if line.event == "submitted"), None)


def is_cancelled(lines: Sequence[Line]) -> bool:
    """Whether `cancel` was typed after the newest submission."""
    last = next((line for line in reversed(lines) if line.event in ("submitted", "cancelled")), None)
    return last is not None and last.event == "cancelled"


def since_submission(lines: Sequence[Line]) -> list[Line]:
    """The events since a person last submitted the run; submissions by a failing job do not count."""
    begin = 0
    for number, line in enumerate(lines):
        if line.event == "submitted" and line.facts.get("by") == "person":
            begin = number
    return list(lines[begin:])
