"""From a checked configuration to a finished run: prepare the data, fork or join the ranks, look back at the end.

Two ways to have ranks. Under torchrun or srun this process is one of them and joins. Otherwise it forks them all on
this machine's CPU, from one parent that has imported everything once.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from megagrok.checkpoint import Checkpoint, find_checkpoint
from megagrok.config import Loaded, RunConfig, to_dict
from megagrok.data.prepare import PreparedData, prepare
from megagrok.errors import CheckpointError, DataError, MegagrokError, RankError
from megagrok.parallel.launch import Placement, discover, join, run_ranks
from megagrok.parallel.quiet import drop_vain_warnings_on_cpu
from megagrok.parallel.ranks import Alone, Ranks
from megagrok.plan import require_runnable, world_size
from megagrok.platform import CPU, find_platform, num_gpus
from megagrok.train.files import RunFiles
from megagrok.train.folder import claimed, write_run_files
from megagrok.train.stop import StopRequest, hold_signals, leave_on_stop

# One collective waits this long for a peer before the run is given up. gloo sees a dead peer at once; this is for one
# that hangs, and has to outlast the slowest save.
COLLECTIVE_TIMEOUT_SECONDS = 1800.0
# What a resumed run may not change: with another model, other data or another order it would be another run.
_FIXED = ("model.", "data.", "train.seed", "train.seq_len")
_ACCEPT = " To go on with other data all the same: --accept-data-change (it is recorded)."


def start_training(run: RunConfig, files: RunFiles, *, accept_data_change: bool = False) -> None:
    """Train to the end of the run, from the newest checkpoint in its folder if there is one, and write the report.

    accept_data_change: go on though the data are not those of the checkpoint, and record it.

    Raises SystemExit with status 76 if the run was asked to stop and has saved, and MegagrokError for everything that
    a user, a file or a machine can cause; a dead rank is a RankError.
    """
    placement = discover()
    with leave_on_stop() as stop:
        if placement is None:
            _train_here(run, files, stop, accept_data_change)
        else:
            _train_as_placed(run, files, placement, accept_data_change)


def _train_here(run: RunConfig, files: RunFiles, stop: StopRequest, accept_data_change: bool) -> None:
    """Fork all ranks from this process."""
    if num_gpus():
        print(
            f"note: training on the CPU; for the {num_gpus()} GPU(s) here: "
            f"torchrun --nproc-per-node {num_gpus()} -m megagrok train ...",
            file=sys.stderr,
        )
    # The data is prepared while this process imports Megatron and DeepSpeed, which takes as long. The child only fills
    # the cache; whatever is wrong with the data is found again below, and raised here.
    ahead = multiprocessing.get_context("fork").Process(target=_prepare_quietly, args=(run,))
    drop_vain_warnings_on_cpu()
    try:
        with hold_signals():
            ahead.start()
        from megagrok.train.finish import finish_run
        from megagrok.train.worker import train_rank

        # A stop that came inside a callback of the imports was swallowed there; its flag was not.
        while ahead.is_alive():
            stop.check()
            ahead.join(timeout=0.2)
    finally:
        ahead.kill()
        ahead.join()
    prepared = _prepare(run)
    num_ranks = world_size(run.parallel)
    with claimed(files):
        _check_resumable(find_checkpoint(files.checkpoints, ranks=Alone(), verify="sizes"), run, accept_data_change)
        write_run_files(run, files, prepared)
        stop.check()
        run_ranks(
            train_rank,
            num_ranks,
            run,
            files,
            prepared,
            CPU,
            COLLECTIVE_TIMEOUT_SECONDS,
            1,
            accept_data_change,
            timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
            # What torch would take alone: cores that this process may use, or OMP_NUM_THREADS.
            threads_per_rank=max(1, torch.get_num_threads() // num_ranks),
        )
        finish_run(run, files, CPU)


def _train_as_placed(run: RunConfig, files: RunFiles, placement: Placement, accept_data_change: bool) -> None:
    """Be one rank of a job that a launcher started."""
    require_runnable(Loaded(run, {}), placement.world_size)
    platform = find_platform(placement.local_rank)
    if not platform.is_cuda:
        drop_vain_warnings_on_cpu()
    from megagrok.train.finish import finish_run
    from megagrok.train.worker import train_rank

    device = platform.device if platform.is_cuda else None
    ranks = join(placement, backend=platform.backend, timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS, device=device)
    with _lost_peers_named(ranks), ExitStack() as held:
        _on_rank_0(ranks, lambda: _prepare(run))
        prepared = _prepare(run)
        _on_rank_0(ranks, lambda: held.enter_context(claimed(files)))
        checkpoint = find_checkpoint(files.checkpoints, ranks=ranks, verify="sizes")
        _on_rank_0(ranks, lambda: _check_resumable(checkpoint, run, accept_data_change))
        _on_rank_0(ranks, lambda: write_run_files(run, files, prepared))
        train_rank(ranks, run, files, prepared, platform, COLLECTIVE_TIMEOUT_SECONDS, 1, accept_data_change)
        _on_rank_0(ranks, lambda: finish_run(run, files, platform))


def _prepare(run: RunConfig) -> PreparedData:
    """The tokens of the run. Raises DataError with every way in which they do not suffice."""
    prepared = prepare(run.data, model_vocab_size=run.model.vocab_size)
    problems = prepared.problems(seq_len=run.train.seq_len, evaluate_samples=run.train.evaluate_samples)
    if problems:
        raise DataError("\n".join(problems))
    return prepared


def _prepare_quietly(run: RunConfig) -> None:
    try:
        _prepare(run)
    except Exception:
        os._exit(1)


def _on_rank_0(ranks: Ranks, work: Callable[[], object]) -> None:
    """Let rank 0 do something while the others wait. What it raises ends them too, silently and with the same status:
    a lost peer would have a scheduler try again. Collective."""
    failure: MegagrokError | None = None
    if ranks.rank == 0:
        try:
            work()
        except MegagrokError as error:
            failure = error
    status = ranks.gather(None if failure is None else failure.exit_code)[0]
    if failure is not None:
        raise failure
    if isinstance(status, int):
        raise SystemExit(status)


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


def _check_resumable(checkpoint: Checkpoint | None, run: RunConfig, accept_data_change: bool) -> None:
    """Refuse to go on with a checkpoint of another run, or beyond the end of this one. Raises CheckpointError that
    lists every difference."""
    if checkpoint is None:
        return
    if checkpoint.step > run.train.steps:
        raise CheckpointError(
            f"{checkpoint.path} has more steps behind it than train.steps = {run.train.steps}. "
            f"Fix: train.steps={checkpoint.step} or more, or give the new run another name (name=...)."
        )
    saved, wanted = _flatten(checkpoint.facts["config"]), _flatten(to_dict(run))
    differences = [
        f"{key}: the checkpoint has {saved.get(key)}, the configuration {wanted.get(key)}"
        for key in sorted({*saved, *wanted})
        if key.startswith(_FIXED) and key != "data.cache" and saved.get(key) != wanted.get(key)
    ]
    if accept_data_change:
        differences = [difference for difference in differences if not difference.startswith("data.")]
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another run:\n  " + "\n  ".join(differences) + "\n"
            "Fix: restore these settings, or give the new run another name (name=...)."
            + (_ACCEPT if all(difference.startswith("data.") for difference in differences) else "")
        )


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {prefix: value}
    return {key: leaf for name, inner in items for key, leaf in _flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}
