"""Finding a rank that hangs or lags, from outside of it: limits on silence, every rank's stack, and who was first.

Dead, hung and slow are three things. A dead rank is seen by its launcher at once; a hung one only by its silence, and
then all its peers are silent too, because they wait for it. So the launcher asks every rank for its Python stack (the
ranks' handler is C code that needs no lock and no cooperation) and looks for the one that does not wait for the others.
"""

import functools
import os
import re
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megagrok.config.schema import WatchConfig
from megagrok.parallel.beats import Beat, Beats, Phase
from megagrok.parallel.forked import STACK_SIGNAL

_LOOK_SECONDS = 0.5
_STACK_SECONDS = 3.0
_SETTLE_SECONDS = 0.1
# A rank of another node may be the one: its launcher speaks first.
_GRACE_SECONDS = 10.0
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
_WAITING_FILES = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py", "/deepspeed/comm/")
_WAITING_LINE = re.compile(r"\.(wait|synchronize)\(")
# A rank lags if its own work took this much longer than its peers', in each half of so many steps. Ranks that share
# the cores of a busy machine differ by a third without any reason.
_LAG_RATIO, _LAG_SECONDS = 1.8, 0.02
_LAG_STEPS, _LEAST_LAG_STEPS, _WARM_UP_STEPS = 16, 12, 3
_Work = tuple[int, dict[int, float]]
"""Steps that all ranks have done, and each one's seconds of own work in them."""


@dataclass(frozen=True, slots=True)
class Hang:
    """What the launcher found."""

    rank: int | None
    """The rank that the others wait for; None if it must be on another node."""
    beat: Beat
    """What that rank, or the most silent one, was doing."""
    text: str
    """The finding in words."""
    stacks: str
    """Python stacks of all ranks of this node."""


@dataclass(slots=True)
class Watch:
    """What a launcher watches its ranks with. One for each start."""

    beats: Beats
    limits: Mapping[Phase, float]
    """Seconds that a rank may be silent in each phase."""
    is_alone: bool = True
    """No other node takes part."""
    peers: Mapping[int, int] = field(default_factory=dict)
    """Rank to a number; ranks with the same number have the same work to do, and are compared."""
    on_look: Callable[[list[Beat]], None] = lambda beats: None
    """Called about twice a second with the beats."""
    say: Callable[[str], None] = lambda line: None
    """Where a lagging rank is named."""
    folder: Path = Path()
    """Where the ranks write their stacks; the launcher sets it."""
    _looked_at: float = 0.0
    _work: deque[_Work] = field(default_factory=lambda: deque(maxlen=4 * _LAG_STEPS))
    _named: set[int] = field(default_factory=set)

    def stack_file(self, rank: int) -> Path:
        """Where a rank writes its stack when it is asked."""
        return self.folder / f"stack-{rank}"

    def look(self, pids: Mapping[int, int]) -> Hang | None:
        """A finding, if a rank has been silent for longer than its phase allows. pids: of the ranks still running."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return None
        self._looked_at = now
        beats = self.beats.read()
        self.on_look(beats)
        self._name_laggards(beats)
        late = [beat for beat in beats if beat.rank in pids and now - beat.at > self.limits[beat.phase]]
        if not late:
            return None
        stopped = {rank for rank, pid in pids.items() if _is_stopped(pid)}
        stacks = self._ask_for_stacks(pids, stopped)
        # A process that was stopped waits for nobody, wherever it stands.
        suspects = [beat for beat in beats if beat.rank in stopped]
        suspects = suspects or [beat for beat in beats if beat.rank in pids and not _waits(stacks[beat.rank])]
        silence = max(now - beat.at - self.limits[beat.phase] for beat in late)
        if not suspects and not self.is_alone and silence < _GRACE_SECONDS:
            return None
        return self._finding(late, suspects, stacks, stopped, now)

    def _finding(
        self, late: list[Beat], suspects: list[Beat], stacks: Mapping[int, str], stopped: set[int], now: float
    ) -> Hang:
        # The furthest behind; of equals the one that fell silent first.
        first = min(suspects or late, key=lambda beat: (beat.step, beat.beats, beat.at))
        doing = f"step {first.step}" if first.phase == "step" else f"{first.phase} (step {first.step})"
        text = (
            f"rank {first.rank} hangs in {doing}: no sign of life for {now - first.at:.1f} s, "
            f"{self.limits[first.phase]:g} s are allowed in this phase (watch.{first.phase}_seconds)"
        )
        if first.rank in stopped:
            text += "; its process has been stopped by a signal"
        if not suspects:
            text = (
                f"no sign of life from {len(late)} rank(s) for {now - first.at:.1f} s in {doing}: all of this node "
                "wait for a peer" + ("" if self.is_alone else " on another node")
            )
        elif len(stacks) > 1:
            text += f"; {len(stacks) - len(suspects)} of {len(stacks)} ranks here wait for a peer"
        whole = "\n".join(f"rank {rank}\n{stack}" for rank, stack in sorted(stacks.items()))
        blamed = first.rank if suspects or self.is_alone else None
        return Hang(blamed, first, text, whole)

    def _ask_for_stacks(self, pids: Mapping[int, int], stopped: set[int]) -> dict[int, str]:
        stacks: dict[int, str] = {}
        # Those that were stopped come last: going on, they would free the others before these are asked.
        for asked in (pids.keys() - stopped, stopped):
            before = {rank: _size(self.stack_file(rank)) for rank in asked}
            for rank in asked:
                _kill(pids[rank], STACK_SIGNAL)
                if rank in stopped:
                    _kill(pids[rank], signal.SIGCONT)
            deadline, sizes = time.monotonic() + _STACK_SECONDS, before
            # A stack is written in many small pieces: it is whole when it has begun and grows no more.
            while time.monotonic() < deadline:
                time.sleep(_SETTLE_SECONDS)
                now = {rank: _size(self.stack_file(rank)) for rank in asked}
                if now == sizes and all(now[rank] > before[rank] for rank in asked):
                    break
                sizes = now
            for rank in asked:
                text = self.stack_file(rank).read_bytes()[before[rank] :].decode("utf-8", "replace")
                stacks[rank] = text or "  (it did not answer: blocked in the kernel, or not yet started)\n"
        return stacks

    def _name_laggards(self, beats: list[Beat]) -> None:
        """Say which rank needs longer for its own work than ranks with the same work, once for each rank."""
        steps = min(beat.worked_steps for beat in beats)
        if steps <= (self._work[-1][0] if self._work else _WARM_UP_STEPS):
            return
        self._work.append((steps, {beat.rank: beat.worked_seconds for beat in beats}))
        recent = [entry for entry in self._work if entry[0] >= steps - _LAG_STEPS]
        middle = min(recent, key=lambda entry: abs(2 * entry[0] - recent[0][0] - steps))
        if steps - recent[0][0] < _LEAST_LAG_STEPS or middle in (recent[0], recent[-1]):
            return
        # In both halves: a machine that was busy with something else for a moment is no slow one.
        halves = (recent[0], middle), (middle, recent[-1])
        for rank in self._work[-1][1].keys() - self._named:
            found = [self._lag(rank, *half) for half in halves]
            if all(own > _LAG_RATIO * usual and own - usual > _LAG_SECONDS for own, usual in found):
                self._named.add(rank)
                own, usual = found[-1]
                self.say(
                    f"rank {rank} is slow: {own:.3f} s of a step is its own work, its peers with the same work need "
                    f"{usual:.3f} s. The others wait for it."
                )

    def _lag(self, rank: int, begin: _Work, end: _Work) -> tuple[float, float]:
        """Seconds of own work in a step between two looks: of the rank, and of its peers; 0, 0 if it has none."""
        seconds = {other: (end[1][other] - begin[1][other]) / (end[0] - begin[0]) for other in end[1]}
        peers = [seconds[other] for other in seconds if other != rank and self._works_like(rank, other)]
        return (seconds[rank], statistics.median(peers)) if peers else (0.0, 0.0)

    def _works_like(self, rank: int, other: int) -> bool:
        return self.peers.get(rank, 0) == self.peers.get(other, 0)


def _waits(stack: str) -> bool:
    """Whether the stack's newest frame waits for another rank."""
    # faulthandler prints the newest thread first, so the main thread comes last.
    _, _, main = stack.rpartition("(most recent call first):")
    frame = _FRAME.search(main)
    return frame is not None and is_waiting_at(frame["file"], int(frame["line"]))


@functools.lru_cache(maxsize=4096)
def is_waiting_at(file: str, line: int) -> bool:
    """Whether a place in the code is one where a rank waits for its peers."""
    if any(part in file for part in _WAITING_FILES):
        return True
    try:
        text = Path(file).read_text(encoding="utf-8").splitlines()[line - 1]
    except (OSError, ValueError, IndexError):
        return False  # no file: code that Python made itself
    return _WAITING_LINE.search(text) is not None


def phase_limits(watch: WatchConfig) -> dict[Phase, float]:
    """Seconds that a rank may be silent, by phase."""
    return {
        "start": watch.start_seconds,
        "load": watch.load_seconds,
        "step": watch.step_seconds,
        "evaluate": watch.evaluate_seconds,
        "save": watch.save_seconds,
    }


def frame_waits(frame: FrameType) -> bool:
    """The same for a running frame of this process."""
    return is_waiting_at(frame.f_code.co_filename, frame.f_lineno)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended, and the launcher will see that
