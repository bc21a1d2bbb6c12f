"""From a checked configuration to a finished run, by one of the two ways to have ranks.

A launcher, one per node under Slurm and the only one elsewhere, forks its ranks and watches them (launcher.py). Under
torchrun this process is a rank and joins; whether it hangs is for torchrun to know.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from megagrok.config import Loaded, RunConfig
from megagrok.errors import RankError
from megagrok.parallel.beats import Beats
from megagrok.parallel.launch import join
from megagrok.parallel.placement import Nodes, Placement, discover
from megagrok.parallel.quiet import drop_vain_warnings_on_cpu
from megagrok.parallel.ranks import Ranks
from megagrok.plan import require_runnable
from megagrok.platform import find_platform
from megagrok.train.beginning import Request, Start, collective_timeout_seconds, on_rank_0, prepared_data, take_up
from megagrok.train.files import RunFiles
from megagrok.train.launcher import launch
from megagrok.train.lease import Lease, leased
from megagrok.train.logbook import Logbook, on_record
from megagrok.train.stop import leave_on_stop


def start_training(run: RunConfig, files: RunFiles, request: Request = Request()) -> None:  # noqa: B008  # it is frozen
    """Train to the end of the run, from the newest checkpoint in its folder if there is one, and write the report.

    Raises SystemExit with status 76 if the run was asked to stop and has saved, and MegagrokError for everything that
    a user, a file or a machine can cause; a dead or hanging rank is a RankError.
    """
    placed = discover()
    with leave_on_stop() as stop:
        if isinstance(placed, Placement):
            _train_as_placed(run, files, placed, request)
        else:
            launch(run, files, placed, stop, request)


def _train_as_placed(run: RunConfig, files: RunFiles, placement: Placement, request: Request) -> None:
    """Be one rank of a job that torchrun started."""
    require_runnable(Loaded(run, {}), placement.world_size)
    platform = find_platform(placement.local_rank)
    if not platform.is_cuda:
        drop_vain_warnings_on_cpu()
    from megagrok.train.finish import finish_run
    from megagrok.train.worker import train_rank

    device = platform.device if platform.is_cuda else None
    timeout = collective_timeout_seconds(run)
    ranks = join(placement, backend=platform.backend, timeout_seconds=timeout, device=device)
    with _lost_peers_named(ranks), ExitStack() as held:
        on_rank_0(ranks, lambda: prepared_data(run))
        prepared = prepared_data(run)
        taken: list[Lease] = []
        on_rank_0(ranks, lambda: taken.append(held.enter_context(leased(files, Nodes(), beating=True))))
        lease = Lease.shared(files.lease, ranks, taken)
        beats = Beats(placement.rank, 1)
        if taken:
            # One page for all: torchrun knows more of the ranks' ends than one of them.
            held.enter_context(on_record(Logbook(files.root, lease.generation, Nodes()), beats))
        on_rank_0(ranks, lambda: take_up(run, files, prepared, request))
        start = Start(request=request, generation=lease.generation, fence=lease, beats=beats, timeout_seconds=timeout)
        train_rank(ranks, run, files, prepared, start)
        if request.looks_back:
            on_rank_0(ranks, lambda: finish_run(run, files, platform))


@contextmanager
def _lost_peers_named(ranks: Ranks) -> Iterator[None]:
    """Turn what gloo and NCCL say when a peer is gone into a RankError."""
    try:
        yield
    except RuntimeError as error:
        # gloo's have no class of their own, only the source file that they come from.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size} lost a peer: {error}\n"
            "The cause is what the rank that failed first has said."
        ) from error
