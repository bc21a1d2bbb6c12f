"""The rank harness of the tests: the launcher itself, with a collective timeout so short that a missed call fails.

A function that runs in ranks lives at module level, takes `ranks` first and keywords after it, and returns values;
tensors come back by value. The parent must not have run torch in parallel: keep torch.set_num_threads(1), which
conftest.py sets for every test process.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from megagrok.parallel import launch

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0


def run_ranks(
    fn: Callable[..., T], world_size: int, *, timeout_seconds: float = TIMEOUT_SECONDS, **kwargs: object
) -> list[T]:
    """fn(ranks, **kwargs) on `world_size` forked ranks; their results in rank order."""
    return launch.run_ranks(partial(fn, **kwargs), world_size, timeout_seconds=timeout_seconds)
