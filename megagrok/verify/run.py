"""Every layout of a grid against the oracle, one after the other, a row as soon as it is known."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megagrok.config import ModelConfig, ParallelConfig, RunConfig
from megagrok.errors import RankError
from megagrok.parallel.launch import run_ranks
from megagrok.plan import check
from megagrok.verify.breaks import BREAKS
from megagrok.verify.choices import BreakName, GridName
from megagrok.verify.compare import Row, compare
from megagrok.verify.grid import Layout, layouts_of
from megagrok.verify.oracle import Trajectory, quiet_twin
from megagrok.verify.twin import Switches, make_twin
from megagrok.verify.witness import witness

TIMEOUT_SECONDS = 60.0
"""A collective that a rank never calls fails after it."""
_LONGEST_FAILURE = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to verify."""

    model: ModelConfig
    switches: Switches
    own: ParallelConfig | None
    """The user's layout, which is tried first; None tries the grid alone."""
    grid: GridName = "default"
    steps: int = 5
    planted: BreakName | None = None

    def layouts(self) -> list[Layout]:
        """What is tried: the grid, or those layouts of it on which the planted bug can show."""
        tried = layouts_of(self.grid, self.model, self.own)
        if self.planted is None:
            return tried
        return [layout for layout in tried if BREAKS[self.planted].can_show(self.twin(layout))]

    def twin(self, layout: Layout) -> RunConfig:
        """The run of one layout. A bug in tied embeddings is planted in a tied twin."""
        model = replace(self.model, tied_embeddings=True) if self.planted == "tied-embedding" else self.model
        run = make_twin(
            model,
            self.switches,
            parallel=layout.parallel,
            micro_batch=layout.micro_batch,
            num_layers=layout.num_layers,
            steps=self.steps,
        )
        problems = [problem for problem in check(run) if not problem.key.startswith("data")]
        assert not problems, (str(layout), problems)
        return run


class Oracles:
    """Trajectories, walked once for all layouts that share one: those of the same depth, and of the same micro-batch
    where the balance loss is measured over it."""

    def __init__(self) -> None:
        self._walked: dict[tuple[int, int], tuple[int, Trajectory]] = {}

    def of(self, run: RunConfig) -> tuple[RunConfig, Trajectory]:
        """The run with the seed that the oracle chose, and its trajectory."""
        sees_micro_batches = run.model.moe.balance_loss == "micro_batch"
        key = run.model.num_layers, run.train.micro_batch if sees_micro_batches else 0
        if key not in self._walked:
            quiet, trajectory = quiet_twin(run)
            self._walked[key] = quiet.train.seed, trajectory
        seed, trajectory = self._walked[key]
        return replace(run, train=replace(run.train, seed=seed)), trajectory


def verify(request: Request, on_row: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run every layout and compare. Called from the main thread of a process that has not run torch in parallel; it
    keeps this process at one torch thread, because it forks after the oracle has computed."""
    torch.set_num_threads(1)
    rows = []
    for row in _rows(request):
        rows.append(row)
        on_row(row)
    return rows


def _rows(request: Request) -> Iterator[Row]:
    oracles = Oracles()
    for layout in request.layouts():
        run, trajectory = oracles.of(request.twin(layout))
        start = time.monotonic()
        try:
            reports = run_ranks(
                witness, layout.num_ranks, run, request.planted, TIMEOUT_SECONDS, timeout_seconds=TIMEOUT_SECONDS
            )
        except RankError as error:
            yield Row(layout, time.monotonic() - start, None, failure=str(error)[-_LONGEST_FAILURE:])
            continue
        yield compare(layout, run, trajectory, reports, time.monotonic() - start)
