"""Who may change a run's folder: the newest start of the run, its highest generation. Not a lock; it keeps nobody out.

A node that was given up may wake up in the middle of a save, hours after the run went on elsewhere. The one idea: what
it has written lies in a folder that carries its own generation and that the new start has removed, and before each
change that a load could see it asks whether the run is still its own. Between that question and the one system call
that follows there is a moment that no file system lets us close; a rename whose source the new start has removed fails
in it too.
"""

from typing import Protocol


class Fence(Protocol):
    """The claim of one start of the run on its folder."""

    @property
    def generation(self) -> int:
        """How often the run was started, this start included: from 1."""
        ...

    def check(self) -> None:
        """Return if this start still holds the run. Raises CheckpointError if a later one does."""
        ...


class Unfenced:
    """For a folder that no other start can want: a tool's output, a test."""

    generation = 0

    def check(self) -> None:
        """Nobody else is there."""
