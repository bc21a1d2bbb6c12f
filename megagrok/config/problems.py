"""A problem of a configuration: which setting, what is wrong, what would work, and where it was written.

Checks return problems; only the doors of this room turn them into one ConfigError. So every problem of a file is
reported in one go instead of one for each submission to a queue.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagrok.errors import ConfigError

Plain = str | int | float | bool | None

SECRET = re.compile(
    r"^[0-9a-f]{40}$"  # W&B
    r"|wandb_v\d_[A-Za-z0-9_]{20,}"
    r"|\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bxai-[A-Za-z0-9]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bAIza[0-9A-Za-z_-]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]+:[^/\s@]+@"
)

SECRET_NAME = re.compile(r"(^|_)(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Fix:
    """Setting `key` to `value` makes the problem go away (the other settings unchanged)."""

    key: str
    value: Plain


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the setting `key` (dotted; empty for the file as a whole)."""

    key: str
    text: str
    fixes: tuple[Fix, ...] = ()
    place: str = ""

    def __str__(self) -> str:
        advice = f" Fix: {_advice(self.fixes)}." if self.fixes else ""
        place = f" ({self.place})" if self.place else ""
        return f"{self.text}{advice}{place}"


def placed(problems: Sequence[Problem], provenance: Mapping[str, str]) -> list[Problem]:
    """The same problems, each with the place its setting was written, where that is known."""
    return [
        problem if problem.place else Problem(problem.key, problem.text, problem.fixes, provenance.get(problem.key, ""))
        for problem in problems
    ]


def raise_problems(problems: Sequence[Problem], source: str) -> None:
    """Raise one ConfigError that lists them all, one a line; return if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(f"{problems[0]}")
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in {source}:\n{lines}")


def is_secret(text: str) -> bool:
    """Whether `text` has the form of a credential of a service that trainings talk to."""
    return SECRET.search(text) is not None


def is_secret_name(name: str) -> bool:
    """Whether a key called `name` would hold a credential."""
    return SECRET_NAME.search(name) is not None


def shown(value: object) -> str:
    """`value` as a message may print it: one line, cut short, and never a credential."""
    if isinstance(value, str):
        if is_secret(value):
            return "(a secret, not shown)"
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)[:80]


def _advice(fixes: Sequence[Fix]) -> str:
    values: dict[str, list[str]] = {}
    for fix in fixes:
        values.setdefault(fix.key, []).append(shown(fix.value).strip("'"))
    return " or ".join(
        f"{key} = {options[0]}" if len(options) == 1 else f"{key} in {{{', '.join(options)}}}"
        for key, options in values.items()
    )
