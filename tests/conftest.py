"""What every test process has in common: one torch thread, tiers by marker, and a closing count of laws not checked."""

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.login_node import LoginNode

# Rank tests fork this process: a forked child hangs in OpenMP if its parent has run torch on several threads.
torch.set_num_threads(1)

NEEDS = {
    "slow": "minutes",
    "gpu": "one NVIDIA GPU",
    "multi_gpu": "two NVIDIA GPUs on one machine",
}
GPUS = {"gpu": 1, "multi_gpu": 2}
UNCHECKED = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="module")
def login() -> Iterator[LoginNode]:
    """A machine without torch to type commands on."""
    with LoginNode() as node:
        yield node


def pytest_configure(config: pytest.Config) -> None:
    """Start the count."""
    config.stash[UNCHECKED] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Laws of a tier that this run leaves out."""
    for item in items:
        item.config.stash[UNCHECKED].update(tier for tier in NEEDS if item.get_closest_marker(tier))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot check, and say what it lacks."""
    for tier, needed in GPUS.items():
        found = torch.cuda.device_count()
        if item.get_closest_marker(tier) and found < needed:
            item.config.stash[UNCHECKED][tier] += 1
            pytest.skip(f"needs {NEEDS[tier]}; torch finds {found}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist a worker hands its count to the one process that writes the report."""
    if isinstance(output := session.config.__dict__.get("workeroutput"), dict):
        output["unchecked"] = dict(session.config.stash[UNCHECKED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take a worker's count. Every worker collects, and so deselects, all tests: the largest count is the count."""
    unchecked = node.config.stash[UNCHECKED]
    for tier, count in node.workeroutput.get("unchecked", {}).items():
        unchecked[tier] = max(unchecked[tier], count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a tier: how many laws stand unchecked, and what it takes to check them."""
    for tier, count in sorted(config.stash[UNCHECKED].items()):
        terminalreporter.write_line(f"{count} laws of tier {tier} not checked: needs {NEEDS[tier]}; pytest -m {tier}")
