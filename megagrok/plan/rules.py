"""What a rule of `plan.check` is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` yields the problems of settings that `reads` names, all that it looks at.

    It runs only if each of those is in its own range; the search for layouts asks it as soon as they are chosen.
    """

    reads: tuple[str, ...]
    find: Callable[[RunConfig], Iterator[Problem]]


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
