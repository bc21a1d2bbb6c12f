"""Whether a run can work at all, said before a process group exists: all problems at once, each with what would help.

The one idea: a rule only offers candidates. A candidate becomes advice if the whole check finds fewer problems with it
than without, so nobody is sent from one refusal into the next.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megagrok.config.checks import field_problems
from megagrok.config.load import Loaded
from megagrok.config.problems import Fix, Plain, Problem, placed, raise_problems
from megagrok.config.schema import RunConfig
from megagrok.plan.batch_rules import BATCH_RULES
from megagrok.plan.layout_rules import LAYOUT_RULES, world_problems
from megagrok.plan.memory_rules import memory_problems

MOST_ADVICE = 3
RULES = (*LAYOUT_RULES, *BATCH_RULES)
WORLD_READS = ("parallel.tensor", "parallel.context", "parallel.pipeline", "parallel.data")


def require_runnable(loaded: Loaded, world_size: int | None = None, memory_bytes: int | None = None) -> None:
    """Raise one ConfigError that lists everything `check` finds, with the place each setting was written."""
    raise_problems(placed(check(loaded.config, world_size, memory_bytes), loaded.provenance), loaded.config.name)


def check(config: RunConfig, world_size: int | None = None, memory_bytes: int | None = None) -> list[Problem]:
    """Everything that keeps the run from working: ranges of single settings, then what settings break together.

    world_size: ranks that are or will be started (--world, Slurm).  memory_bytes: of the device of one rank.  None
    leaves them unchecked.  Needs no device, and reads no environment: whoever knows the two hands them in.
    """
    find = partial(_find, world_size=world_size, memory_bytes=memory_bytes)
    problems = find(config)
    return [
        dataclasses.replace(problem, fixes=_that_help(config, find, problem.fixes, len(problems)))
        for problem in problems
    ]


def with_setting(config: RunConfig, key: str, value: Plain) -> RunConfig:
    """`config` with one dotted setting replaced; a number in the key picks an item of a list."""
    changed: RunConfig = _replaced(config, key.split("."), value)
    return changed


def _find(config: RunConfig, *, world_size: int | None, memory_bytes: int | None) -> list[Problem]:
    problems = field_problems(config)
    broken = [problem.key for problem in problems]
    for rule in RULES:
        if not _are_broken(rule.reads, broken):
            problems += rule.find(config)
    if world_size is not None and not _are_broken(WORLD_READS, broken):
        problems += world_problems(config, world_size)
    if memory_bytes is not None and not problems:
        problems += memory_problems(config, memory_bytes)
    return problems


def _are_broken(reads: Sequence[str], broken: Sequence[str]) -> bool:
    return any(key == read or key.startswith(f"{read}.") for read in reads for key in broken)


def _that_help(
    config: RunConfig, find: Callable[[RunConfig], list[Problem]], fixes: Sequence[Fix], num_problems: int
) -> tuple[Fix, ...]:
    helpful: list[Fix] = []
    for fix in dict.fromkeys(fixes):
        of_this_key = sum(other.key == fix.key for other in helpful)
        if of_this_key < MOST_ADVICE:
            changed = with_setting(config, fix.key, fix.value)
            if len(find(changed)) < num_problems:
                helpful.append(fix)
    return tuple(helpful)


def _replaced(section: Any, names: Sequence[str], value: Plain) -> Any:
    name, *rest = names
    if isinstance(section, tuple):
        index = int(name)
        return (*section[:index], _replaced(section[index], rest, value), *section[index + 1 :])
    inner = _replaced(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})
