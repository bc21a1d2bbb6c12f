"""What a rule of `plan.check` is made of, and the numbers near a number from which rules draw their advice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig

MOST_CANDIDATES = 12


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` yields the problems of settings that `reads` names; it runs only if each of those is in its own range."""

    reads: tuple[str, ...]
    find: Callable[[RunConfig], Iterator[Problem]]


def divisors(number: int, near: int) -> list[int]:
    """The divisors of `number`, nearest to `near` first, the larger first of two that are as near."""
    small = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    every = {*small, *(number // value for value in small)}
    return sorted(every, key=lambda value: (abs(value - near), -value))[:MOST_CANDIDATES]


def multiples(step: int, near: int) -> list[int]:
    """The multiples of `step` on both sides of `near`, without 0."""
    below = near // step * step
    return [value for value in (below, below + step) if value > 0]


def not_a_multiple(key: str, value: int, rule: str, step: int, why: str, *fixes: list[Fix]) -> Iterator[Problem]:
    """The problem "`key` = `value`, needs a multiple of `rule` (`step`)", if it is one.

    fixes: candidates, one list for each setting that could give way; `check` keeps those that work.
    """
    if value % step:
        reason = f": {why}." if why else "."
        candidates = tuple(fix for group in fixes for fix in group)
        yield Problem(key, f"{key} = {value}, needs a multiple of {rule} ({step}){reason}", candidates)


def fixes(key: str, values: list[int]) -> list[Fix]:
    """Candidates that set `key` to each of `values`."""
    return [Fix(key, value) for value in values]
