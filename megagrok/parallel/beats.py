"""Heartbeats: what each rank of this machine is doing, in memory that its launcher shares. No files, no messages.

A rank writes one small row: phase, step, when. Its launcher reads the rows without the rank's help, so a rank that
hangs in a collective, in C code or in a stopped process is seen all the same.
"""

import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, get_args

import numpy as np

Phase = Literal["start", "load", "step", "evaluate", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_ROW = np.dtype(
    [(name, "i8") for name in ("phase", "step", "beats", "saved", "worked_steps")]
    + [(name, "f8") for name in ("at", "worked", "slowest_save")]
)
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank as it was last heard."""

    rank: int
    phase: Phase
    step: int
    """The step it works on, or the last one that it has done."""
    beats: int
    """How often it was heard in all."""
    at: float
    """When, on the clock time.monotonic() of this machine."""
    saved: int | None
    """Newest step that it knows to be saved."""
    worked_steps: int
    """Steps that it has done since it started."""
    worked_seconds: float
    """Time in those steps in which it did not wait for its peers, as sampled by `metered`."""
    slowest_save_seconds: float
    """Of the saves that it has seen through since it started, from copy to commit; 0 if there was none."""


class Pulse:
    """One rank's hand on its row."""

    def __init__(self, row: np.ndarray) -> None:
        self._row = row

    def beat(self) -> None:
        """Say that it is alive and got further."""
        self._row["at"] = time.monotonic()
        self._row["beats"] += 1

    def enter(self, phase: Phase, step: int) -> None:
        """Say what it does from now on."""
        self._row["phase"], self._row["step"] = PHASES.index(phase), step
        self.beat()

    def saved(self, step: int, took_seconds: float = 0.0) -> None:
        """Say that a step is safe, and how long its save took, unless it was an earlier start's."""
        self._row["saved"] = step
        self._row["slowest_save"] = max(float(self._row["slowest_save"]), took_seconds)
        self.beat()

    def step_done(self) -> None:
        """Count a step."""
        self._row["worked_steps"] += 1
        self.beat()

    @contextmanager
    def metered(self, is_waiting: Callable[[FrameType], bool]) -> Iterator[None]:
        """Sample what the calling thread does while the block runs, and add up the time in steps that is its own work.

        is_waiting: whether a frame waits for peers. A gap between two samples is a wait if both ends are: a rank that
        was stopped or starved in its own work has worked all the while, as far as its peers can tell.
        """
        main, ended = threading.get_ident(), threading.Event()

        def sample() -> None:
            before, was_waiting = time.monotonic(), False
            while not ended.wait(_SAMPLE_SECONDS):
                frame, now = sys._current_frames().get(main), time.monotonic()
                waits = frame is not None and is_waiting(frame)
                if not (waits and was_waiting) and PHASES[int(self._row["phase"])] == "step":
                    self._row["worked"] += now - before
                before, was_waiting = now, waits

        thread = threading.Thread(target=sample, name="work-meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Enter a phase, and go back to the one before."""
        before = PHASES[int(self._row["phase"])], int(self._row["step"])
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter(*before)


class Beats:
    """The rows of the ranks first_rank .. first_rank + num_ranks - 1. Made before they are forked."""

    def __init__(self, first_rank: int, num_ranks: int) -> None:
        self._first_rank = first_rank
        # Anonymous and shared: it is inherited across a fork, and gone with the last process that has it.
        self._rows = np.frombuffer(mmap.mmap(-1, num_ranks * _ROW.itemsize), dtype=_ROW)
        self._rows["saved"] = -1
        self._rows["at"] = time.monotonic()

    def pulse(self, rank: int) -> Pulse:
        """The row of a rank, to write."""
        return Pulse(self._rows[rank - self._first_rank : rank - self._first_rank + 1].reshape(()))

    def read(self) -> list[Beat]:
        """All rows as they are now, in rank order."""
        return [
            Beat(
                rank=self._first_rank + index,
                phase=PHASES[int(row["phase"])],
                step=int(row["step"]),
                beats=int(row["beats"]),
                at=float(row["at"]),
                saved=int(row["saved"]) if row["saved"] >= 0 else None,
                worked_steps=int(row["worked_steps"]),
                worked_seconds=float(row["worked"]),
                slowest_save_seconds=float(row["slowest_save"]),
            )
            for index, row in enumerate(self._rows.copy())
        ]
