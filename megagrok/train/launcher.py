"""A launcher: prepares, takes hold of the run, forks the ranks of its node, watches them to their end, looks back.

Under Slurm there is one per node, and they talk through `meet`; elsewhere there is one, and it is alone. What it saw is
on its page of the start (logbook.py), whatever becomes of it.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from megagrok.config import RunConfig
from megagrok.data.prepare import PreparedData
from megagrok.errors import MachineError
from megagrok.kernels.choice import check_kernels
from megagrok.parallel.beats import Beat, Beats
from megagrok.parallel.crew import meet
from megagrok.parallel.launch import count_gpus, run_ranks
from megagrok.parallel.placement import Nodes
from megagrok.parallel.quiet import drop_vain_warnings_on_cpu
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.topology import Topology
from megagrok.parallel.watch import Watch, phase_limits
from megagrok.plan import world_size
from megagrok.platform import CPU, check_precision, find_platform
from megagrok.train.beginning import (
    Request,
    Start,
    collective_timeout_seconds,
    on_rank_0,
    prepare_quietly,
    prepared_data,
    take_up,
)
from megagrok.train.files import RunFiles
from megagrok.train.lease import Lease, leased, next_generation
from megagrok.train.logbook import Logbook, on_record
from megagrok.train.stop import StopRequest, hold_signals

# A launcher waits this long for those of the other nodes: imports from a shared disk, and node 0's work on the data.
_MEET_SECONDS = 1800.0


def launch(run: RunConfig, files: RunFiles, nodes: Nodes, stop: StopRequest, request: Request) -> None:
    """Train with this node's share of the ranks. Every node's launcher calls it; raises as `start_training` says."""
    mine = nodes.local_ranks(world_size(run.parallel))
    on_gpus = _uses_gpus(mine, nodes)
    if not on_gpus:
        check_precision(CPU, run.train.precision)
        check_kernels(run.kernels, CPU.device)
    beats = Beats(mine.start, len(mine))
    with meet(nodes, timeout_seconds=_MEET_SECONDS) as launchers, ExitStack() as held:
        taken: list[Lease] = []
        with _refusals_on_record(files, nodes, beats):
            prepared = _prepare(run, launchers, stop)
            on_rank_0(launchers, lambda: taken.append(held.enter_context(leased(files, nodes))))
        lease = Lease.shared(files.lease, launchers, taken)
        logbook = Logbook(files.root, lease.generation, nodes)
        with on_record(logbook, beats):
            on_rank_0(launchers, lambda: take_up(run, files, prepared, request))
            stop.check()
            start = Start(
                request=request,
                generation=lease.generation,
                fence=lease,
                beats=beats,
                timeout_seconds=collective_timeout_seconds(run),
            )
            _run_watched(run, files, prepared, start, logbook, lease, nodes, on_gpus)
            if nodes.index == 0 and request.looks_back:
                from megagrok.train.finish import finish_run

                finish_run(run, files, find_platform() if on_gpus else CPU)


@contextmanager
def _refusals_on_record(files: RunFiles, nodes: Nodes, beats: Beats) -> Iterator[None]:
    """A start that is refused before it has the run leaves a page too, under Slurm: whoever supervises the job must
    learn why nothing was trained."""
    try:
        yield
    except BaseException as error:
        if nodes.job is not None and files.root.exists():
            Logbook(files.root, next_generation(files), nodes).close(beats.read(), error)
        raise


def _run_watched(
    run: RunConfig,
    files: RunFiles,
    prepared: PreparedData,
    start: Start,
    logbook: Logbook,
    lease: Lease,
    nodes: Nodes,
    on_gpus: bool,
) -> None:
    from megagrok.train.worker import train_rank

    num_ranks, topology = world_size(run.parallel), Topology.of(run.parallel)

    def look(seen: list[Beat]) -> None:
        logbook.look(seen)
        lease.refresh()

    watch = Watch(
        start.beats,
        phase_limits(run.watch),
        is_alone=nodes.count == 1,
        # Stages differ in work; the ranks of one stage do not.
        peers={rank: topology.coordinates(rank).pipeline for rank in range(num_ranks)},
        on_look=look,
        say=partial(print, file=sys.stderr, flush=True),
    )
    run_ranks(
        train_rank,
        num_ranks,
        run,
        files,
        prepared,
        start,
        timeout_seconds=start.timeout_seconds,
        # What torch would take alone: cores that this process may use, or OMP_NUM_THREADS.
        threads_per_rank=max(1, torch.get_num_threads() // len(nodes.local_ranks(num_ranks))),
        on_started=logbook.started,
        nodes=nodes,
        log_of=None if nodes.job is None else logbook.log_of,
        watch=watch,
        on_gpus=on_gpus,
    )


def _uses_gpus(mine: range, nodes: Nodes) -> bool:
    """Whether the ranks of this node get GPUs. Raises MachineError if a Slurm job has some, and too few."""
    found = count_gpus()
    if found >= len(mine):
        return True
    if found and nodes.job is not None:
        raise MachineError(
            f"this node has {found} GPU(s) for {len(mine)} ranks of the layout: each rank needs its own. "
            "Start more nodes, or ask Slurm for more GPUs per node."
        )
    if found:
        print(f"note: {len(mine)} ranks, {found} GPU(s) here: training on the CPU", file=sys.stderr)
    return False


def _prepare(run: RunConfig, launchers: Ranks, stop: StopRequest) -> PreparedData:
    """The data, prepared once by node 0 while it imports Megatron and DeepSpeed, which takes as long.

    A child fills the cache; whatever is wrong with the data is found again by all below, and raised here.
    """
    ahead = multiprocessing.get_context("fork").Process(target=prepare_quietly, args=(run,))
    drop_vain_warnings_on_cpu()
    try:
        if launchers.rank == 0:
            with hold_signals():
                ahead.start()
        import_trainer()
        # A stop that came inside a callback of the imports was swallowed there; its flag was not.
        while launchers.rank == 0 and ahead.is_alive():
            stop.check()
            ahead.join(timeout=0.2)
    finally:
        if ahead.pid is not None:
            ahead.kill()
            ahead.join()
    launchers.barrier()
    return prepared_data(run)


def import_trainer() -> None:
    """What ranks and report need: imported once, here, and shared by all that is forked."""
    import megagrok.train.finish
    import megagrok.train.worker  # noqa: F401
