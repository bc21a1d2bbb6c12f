"""What launchers and ranks have in common at the start of a run: the data, the claim on the folder, what may go on.

Imports neither Megatron nor DeepSpeed, so that a launcher can refuse a run, or prepare its data, before they are there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, TypeAlias

from megagrok.checkpoint import Checkpoint, Fence, find_checkpoint, require_one_run
from megagrok.config import RunConfig, from_dict, to_dict
from megagrok.data.batches import TrainBatches
from megagrok.data.prepare import PreparedData, prepare
from megagrok.errors import CheckpointError, DataError, MegagrokError
from megagrok.parallel.beats import Beats
from megagrok.parallel.ranks import Alone, Ranks
from megagrok.parallel.watch import phase_limits
from megagrok.train.attempt import read_attempts
from megagrok.train.files import RunFiles
from megagrok.train.folder import write_run_files
from megagrok.train.room import require_room

if TYPE_CHECKING:
    from megagrok.engine.engine import Engine

Inject: TypeAlias = "Callable[[int, Engine], None]"

# A collective waits for this much longer than the watch lets a rank be silent: the watch knows which rank it was.
_COLLECTIVE_GRACE_SECONDS = 120.0
# What a resumed run may not change: with another model, other data or another order it would be another run.
_FIXED = ("model.", "data.", "train.seed", "train.seq_len")
_ACCEPT = " To go on with other data all the same: --accept-data-change (it is recorded)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a start beside its configuration."""

    accept_data_change: bool = False
    """Go on though the data are not those of the checkpoint, and record it."""
    inject: Optional[Inject] = None  # noqa: UP045  # the alias is text
    """Called in every step of every rank before its gradients are reduced; for drills."""
    looks_back: bool = True
    """At the end of the run, write the report and a sample of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run, as each of its ranks sees it."""

    request: Request
    generation: int
    """How often the run was started, this start included."""
    fence: Fence
    """Says whether a later start holds the run."""
    beats: Beats
    """Where the rank says what it does."""
    timeout_seconds: float
    """For one collective."""


def collective_timeout_seconds(run: RunConfig) -> float:
    """How long a collective waits for a peer before the run is given up."""
    return max(phase_limits(run.watch).values()) + _COLLECTIVE_GRACE_SECONDS


def prepared_data(run: RunConfig) -> PreparedData:
    """The tokens of the run. Raises DataError with every way in which they do not suffice."""
    prepared = prepare(run.data, model_vocab_size=run.model.vocab_size)
    problems = prepared.problems(seq_len=run.train.seq_len, evaluate_samples=run.train.evaluate_samples)
    if problems:
        raise DataError("\n".join(problems))
    return prepared


def prepare_quietly(run: RunConfig) -> None:
    """Fill the cache, in a process of its own; whatever is wrong is found, and said, by `prepared_data`."""
    try:
        prepared_data(run)
    except Exception:
        os._exit(1)


def on_rank_0(ranks: Ranks, work: Callable[[], object]) -> None:
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


def take_up(run: RunConfig, files: RunFiles, prepared: PreparedData, request: Request) -> None:
    """Make sure that the run can go on from what its folder holds, and leave there what later commands need.

    One process calls it, with the folder in its hold. Raises CheckpointError, and MachineError if there is no room for
    checkpoints.
    """
    require_room(run, files.checkpoints)
    checkpoint = find_checkpoint(files.checkpoints, ranks=Alone(), verify="sizes")
    require_one_run(files.checkpoints)
    if checkpoint is None:
        _check_nothing_was_lost(files)
    _check_resumable(checkpoint, run, request.accept_data_change)
    if checkpoint is not None:
        _check_position(checkpoint, run, prepared, request.accept_data_change)
    write_run_files(run, files, prepared)


def _check_nothing_was_lost(files: RunFiles) -> None:
    """Refuse to begin a run that has begun before, and saved: its checkpoints must be somewhere. Raises
    CheckpointError."""
    saved = max((attempt.saved_step or 0 for attempt in read_attempts(files.root)), default=0)
    if saved:
        raise CheckpointError(
            f"{files.checkpoints} has no checkpoint, though an earlier start saved step {saved} there: not starting "
            f"from scratch. Bring the checkpoints back; to begin again, remove {files.root}, or choose another name "
            "(name=...)."
        )


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
    # Decoded, so that a setting which is younger than the checkpoint has its default there.
    before = from_dict(checkpoint.facts["config"], source=str(checkpoint.path))  # type: ignore[arg-type]  # it checks
    saved, wanted = _flatten(to_dict(before)), _flatten(to_dict(run))
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


def _check_position(checkpoint: Checkpoint, run: RunConfig, prepared: PreparedData, accept_data_change: bool) -> None:
    """Refuse data that are not the checkpoint's before ranks exist, each of which takes the position itself. Raises
    DataError."""
    data = TrainBatches.of(run, prepared, data_rank=0)
    data.load_state(checkpoint.facts["data"], accept_change=accept_data_change)  # type: ignore[arg-type]  # it checks


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {prefix: value}
    return {key: leaf for name, inner in items for key, leaf in _flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}
