"""Doing something on every rank, and failing on all if it failed on any. Knows no files."""

from collections.abc import Callable

from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON, Ranks


def together(ranks: Ranks, failed: str, work: Callable[[], JSON]) -> list[JSON]:
    """Do `work` on this rank and return what all ranks' work returned, or raise on all what failed on any."""
    cause: Exception | None = None
    report: dict[str, JSON] = {"value": None, "problem": None}
    try:
        report["value"] = work()
    except Exception as error:  # not to go on: it is raised below, on the other ranks too, instead of a hang there
        cause = error
        report["problem"] = str(error) if isinstance(error, CheckpointError) else repr(error)
    values: list[JSON] = []
    problems = []
    for rank, other in enumerate(ranks.gather(report)):
        assert isinstance(other, dict)
        values.append(other["value"])
        if other["problem"] is not None:
            problems.append(f"rank {rank}: {other['problem']}")
    if problems:
        more = f"; and {len(problems) - 3} more ranks" if problems[3:] else ""
        raise CheckpointError(f"{failed}: {'; '.join(problems[:3])}{more}") from cause
    return values
