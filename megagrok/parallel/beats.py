"""Heartbeats: what each rank of this machine is doing, in memory that its launcher shares. No files, no messages.

A rank writes one small row: phase, step, when. Its launcher reads the rows without the rank's help, so a rank that hangs
in a collective, in C code or in a stopped process is seen all the same.
"""

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Phase = Literal["start", "load", "step", "evaluate", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_ROW = np.dtype([("phase", "i8"), ("step", "i8"), ("beats", "i8"), ("at", "f8"), ("saved", "i8")])


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

    def saved(self, step: int) -> None:
        """Say that a step is safe."""
        self._row["saved"] = step
        self.beat()

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
        return Pulse(self._rows[rank - self._first_rank : rank - self._first_rank + 1])

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
            )
            for index, row in enumerate(self._rows.copy())
        ]
