"""The loss ledger: every instant of a rank's step belongs to exactly one row, so the rows add up to the step.

Pure arithmetic over timelines, no torch and no clocks: trace.py makes the timelines, meetings.py says who met whom.

A rank's timeline is what it did in order: its own work (a row and seconds), the moments at which it arrived at a
meeting with other ranks (a collective, a message), and the times at which it could not go on before that meeting was
over. The one idea: in such a time, what passes until the last rank has arrived is a wait, the rest is the transfer.
`settle` plays the timelines of all ranks against each other: as they were recorded, which gives back the recorded
step, or with the recording's own cost taken out of every rank's work, so that waits follow from true arrivals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megagrok.plan.estimate import StepSeconds

ROWS = (*(field.name for field in fields(StepSeconds)), "loading", "checkpoint", "host")
"""The planner's rows, and three that it has no price for: making the next batch, saves, and what runs between the
kernels (Python, autograd's book-keeping, views). On a CPU `launch` is empty: host and device are one."""

COMMUNICATION = ("tensor", "context", "expert", "pipeline", "data")


@dataclass(frozen=True, slots=True)
class Work:
    """Time of its own: nothing that another rank does makes it shorter or longer."""

    row: str
    seconds: float
    events: int = 0
    """Operations that were recorded meanwhile; each made the work longer than it is when nobody looks."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """From here on no peer waits for this rank at `meeting`, to which a rank comes once."""

    meeting: str
    when: float
    """Seconds on the clock of all ranks of the machine."""
    row: str
    """Of COMMUNICATION."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The rank could not go on before `meeting` was over."""

    meeting: str
    start: float
    seconds: float


Item = Work | Arrival | Blocked


@dataclass(frozen=True, slots=True)
class Timeline:
    """One rank's step."""

    stage: int
    """Pipeline stage: waiting for a rank of one's own stage is imbalance, for one of another stage bubble."""
    start: float
    """Seconds on a clock that all ranks of the machine share."""
    items: tuple[Item, ...]
    cpu_seconds: float = 0.0
    """Of the rank's thread."""

    @property
    def seconds(self) -> float:
        """Of the step, as recorded."""
        return sum(item.seconds for item in self.items if not isinstance(item, Arrival))

    @property
    def events(self) -> int:
        """Operations that were recorded."""
        return sum(item.events for item in self.items if isinstance(item, Work))


def settle(timelines: Sequence[Timeline], event_seconds: float = 0.0) -> list[dict[str, float]]:
    """Seconds of each row, for each rank. `event_seconds` is what recording one operation costs.

    With 0 the rows of a rank add up to its recorded step, whatever the timelines are.
    """
    play = _Play(timelines, event_seconds)
    while not play.is_over:
        if not any([play.advance(rank) for rank in range(len(timelines))]):
            raise AssertionError("every rank waits for another one: the recording of a meeting is not complete")
    return play.rows


class _Play:
    """All ranks' timelines, each played as far as the others let it."""

    def __init__(self, timelines: Sequence[Timeline], event_seconds: float) -> None:
        self.rows = [dict.fromkeys(ROWS, 0.0) for _ in timelines]
        self._timelines, self._event_seconds = timelines, event_seconds
        self._at = [0] * len(timelines)
        first = min(timeline.start for timeline in timelines)
        self._clocks = [timeline.start - first for timeline in timelines]
        self._came: dict[str, dict[int, float]] = {}
        self._recorded = _recorded_arrivals(timelines)

    @property
    def is_over(self) -> bool:
        """Whether every rank has come to the end of its step."""
        return all(at == len(timeline.items) for at, timeline in zip(self._at, self._timelines, strict=True))

    def advance(self, rank: int) -> bool:
        """Play one rank until it has to wait for one that has not come that far; whether it moved at all."""
        items, before = self._timelines[rank].items, self._at[rank]
        while self._at[rank] < len(items) and self._is_done(rank, items[self._at[rank]]):
            self._at[rank] += 1
        return self._at[rank] > before

    def _is_done(self, rank: int, item: Item) -> bool:
        match item:
            case Work():
                self._spend(rank, item.row, max(0.0, item.seconds - item.events * self._event_seconds))
            case Arrival():
                self._came.setdefault(item.meeting, {})[rank] = self._clocks[rank]
            case Blocked():
                return self._leaves(rank, item)
        return True

    def _leaves(self, rank: int, item: Blocked) -> bool:
        """Book a stay at a meeting, unless somebody it waits for has yet to come."""
        arrival, last = self._recorded[item.meeting]
        wait = max(0.0, last.when - item.start)
        if wait > item.seconds:
            # It left before the last one came, so it did not wait for it: a send that is buffered, a broadcast.
            self._spend(rank, arrival.row, item.seconds)
            return True
        came = self._came.get(item.meeting, {})
        if len(came) < last.ranks:
            return False
        now, stage = self._clocks[rank], self._timelines[rank].stage
        everyone = max(now, *came.values())
        own = max(now, *(when for peer, when in came.items() if self._timelines[peer].stage == stage))
        self._spend(rank, "imbalance", own - now)
        self._spend(rank, "bubble", everyone - own)
        self._spend(rank, arrival.row, item.seconds - wait)
        return True

    def _spend(self, rank: int, row: str, seconds: float) -> None:
        self.rows[rank][row] += seconds
        self._clocks[rank] += seconds


@dataclass(slots=True)
class _Last:
    """Of a meeting as it was recorded: when the last rank came, and how many did."""

    when: float
    ranks: int


def _recorded_arrivals(timelines: Sequence[Timeline]) -> dict[str, tuple[Arrival, _Last]]:
    found: dict[str, tuple[Arrival, _Last]] = {}
    for timeline in timelines:
        for item in timeline.items:
            if isinstance(item, Arrival):
                _, last = found.setdefault(item.meeting, (item, _Last(item.when, 0)))
                last.when, last.ranks = max(last.when, item.when), last.ranks + 1
    return found
