"""Times of several implementations of one operation, taken so that a noisy machine cannot choose the winner.

Every round runs each contender once, the order rotates from round to round, and a ratio is formed within a round before
its median is taken over rounds: what slows the machine for a second slows all of a round. Not a profiler, and not the
table (bench.py). What an operation keeps for its backward pass is what autograd's hooks see of it: tensors that a
custom function holds in any other way than `save_for_backward` would be missed, and ours hold none.
"""

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from megagrok.platform import Platform

Run = Callable[[], None]
"""Forward and backward once, on inputs made before. It may wait for nothing: its caller waits for the device."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape, and those who race on it."""

    op: str
    shape: str
    """In words, as the table shows it."""
    flops: float
    """That the operation needs, forward and backward, recomputation not counted; 0 where bytes are what it costs."""
    bytes: float
    """That must move to and from memory at least, forward and backward; 0 where FLOPs are what it costs."""
    makes: Mapping[str, Callable[[], Run]]
    """Name of an implementation -> what makes its inputs and returns its run. Weights are `nn.Parameter`: they are not
    counted as activations; inputs are plain tensors."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one implementation."""

    seconds: tuple[float, ...]
    """Of one call, round by round."""
    saved_bytes: int
    """Most that autograd held at once for the backward pass, parameters left out."""

    @property
    def median(self) -> float:
        """Seconds of one call, in the middle round."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True)
class Race:
    """All that was measured of one case."""

    case: Case
    timings: Mapping[str, Timing]
    failed: Mapping[str, str]
    """Of those that may fail: what they said instead of running."""

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast `name` is as `other`: the median over rounds of their ratio within a round."""
        pairs = zip(self.timings[other].seconds, self.timings[name].seconds, strict=True)
        return median(theirs / mine for theirs, mine in pairs)


def race(
    case: Case,
    platform: Platform,
    *,
    least_rounds: int = 3,
    most_rounds: int = 15,
    budget_seconds: float = 0.0,
    sample_seconds: float = 0.02,
    may_fail: Container[str] = (),
) -> Race:
    """Time all of a case.

    A contender is called as often within a round as it takes to last `sample_seconds`. After `least_rounds` no round
    starts that would end beyond `budget_seconds` of rounds. Whoever is in `may_fail` and raises is left out.
    """
    runs, saved, calls, failed = _start(case, platform, sample_seconds, may_fail)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start = time.perf_counter()
    for number in range(most_rounds if names else 0):
        elapsed = time.perf_counter() - start
        if number >= least_rounds and elapsed * (number + 1) / number > budget_seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds_of(runs[name], platform, calls[name]))
    return Race(case, {name: Timing(tuple(taken[name]), saved[name]) for name in names}, failed)


def seconds_of(run: Run, platform: Platform, calls: int = 1) -> float:
    """Of one call, as the mean of `calls` in a row, until the device is done with the last."""
    platform.wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    platform.wait()
    return (time.perf_counter() - start) / calls


def _start(
    case: Case, platform: Platform, sample_seconds: float, may_fail: Container[str]
) -> tuple[dict[str, Run], dict[str, int], dict[str, int], dict[str, str]]:
    """Make all and run each: first calls make buffers and compile."""
    runs: dict[str, Run] = {}
    saved: dict[str, int] = {}
    calls: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, make in case.makes.items():
        try:
            run = make()
            start = time.perf_counter()
            saved[name] = saved_activation_bytes(run)
            platform.wait()
            once = time.perf_counter() - start
            if once < 100 * sample_seconds:
                once = seconds_of(run, platform)
        except Exception as error:
            # Another library on a machine it does not know may raise anything; the table then says what.
            if name not in may_fail:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        runs[name], calls[name] = run, max(1, min(1000, round(sample_seconds / once)))
    return runs, {name: saved[name] for name in runs}, calls, failed


def saved_activation_bytes(run: Run) -> int:
    """Most bytes that autograd holds at once during a run: distinct storages that are no parameter's."""
    held = _Held()
    with torch.autograd.graph.saved_tensors_hooks(held.take, _SavedTensor.unpack):
        run()
    return held.most_bytes


class _Held:
    """Storages that saved tensors share, each counted while any of them lives."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self._bytes = 0
        self._holders: dict[int, int] = {}

    def take(self, tensor: Tensor) -> "_SavedTensor":
        """What autograd keeps in the tensor's place."""
        is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        return _SavedTensor(tensor, None if is_parameter else self)

    def add(self, address: int, size: int) -> None:
        """One more saved tensor lies in that storage."""
        if self._holders.setdefault(address, 0) == 0:
            self._bytes += size
            self.most_bytes = max(self.most_bytes, self._bytes)
        self._holders[address] += 1

    def drop(self, address: int, size: int) -> None:
        """One fewer."""
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self._bytes -= size


class _SavedTensor:
    """A tensor in autograd's hands; tells `held` when autograd lets go of it."""

    def __init__(self, tensor: Tensor, held: _Held | None) -> None:
        self._tensor, self._held = tensor, held
        storage = tensor.untyped_storage()
        self._address, self._size = storage.data_ptr(), storage.nbytes()
        if held is not None:
            held.add(self._address, self._size)

    def unpack(self) -> Tensor:
        """The tensor, for the backward pass."""
        return self._tensor

    def __del__(self) -> None:
        if self._held is not None:
            self._held.drop(self._address, self._size)
