"""What a run must be after whatever was done to it: the run that nobody touched.

O1 losses      every loss of every step, in each life that made the step, has the same bits
O2 state       every tensor of the last checkpoint has the same bits (weights, moments, router loads); so the position
O3 samples     the ledger proves that every sample was used once, in order
O4 progress    no fault costs a checkpoint that was committed before it
O5 exit        each life ends with the documented status and says why
O6 remains     no process, no unfinished checkpoint, no lease is left behind

Dropout needs no random state to compare: its masks are arithmetic over seed and position.
"""

from dataclasses import dataclass, field

import xxhash

from megagrok.checkpoint import find_checkpoint, list_steps
from megagrok.parallel.ranks import JSON, Alone
from megagrok.telemetry.metrics_file import read_metrics
from megagrok.train.account import audit_run
from megagrok.train.files import RunFiles
from megagrok.train.lease import read_lease


@dataclass(slots=True)
class Losses:
    """Losses of one run by step, over all its lives."""

    by_step: dict[int, float] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    num_redone: int = 0

    def take(self, files: RunFiles) -> None:
        """Read what the life that has just ended left in metrics.jsonl."""
        if not files.metrics.exists():
            return
        for record in read_metrics(files.metrics).steps:
            before = self.by_step.setdefault(record.step, record.loss)
            if before.hex() != record.loss.hex():
                self.contradictions.append(f"O1: step {record.step} had loss {before!r}, later {record.loss!r}")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the untouched run left."""

    losses: dict[int, float]
    digests: dict[str, str]
    position: JSON


def expect(files: RunFiles, step: int) -> Expected:
    """Take the untouched run as the measure."""
    losses = Losses()
    losses.take(files)
    digests, position = _state(files, step)
    return Expected(losses.by_step, digests, position)


def differences(files: RunFiles, losses: Losses, expected: Expected, step: int) -> list[str]:
    """Everything in which a run that is done differs from the untouched one, by the numbers above."""
    found = list(losses.contradictions)
    for number in sorted(losses.by_step.keys() | expected.losses.keys()):
        ours, theirs = losses.by_step.get(number), expected.losses.get(number)
        if ours is None or theirs is None or ours.hex() != theirs.hex():
            found.append(f"O1: step {number} has loss {ours!r}, untouched {theirs!r}")
    digests, position = _state(files, step)
    names = sorted(
        name for name in digests.keys() | expected.digests.keys() if digests.get(name) != expected.digests.get(name)
    )
    if names:
        found.append(f"O2: {len(names)} of {len(expected.digests)} tensors differ, {names[0]} first")
    if position != expected.position:
        found.append(f"O2: the position in the data is {position}, untouched {expected.position}")
    found += [f"O3: {problem}" for problem in audit_run(files).problems]
    return found + remains(files)


def remains(files: RunFiles) -> list[str]:
    """What a run that has ended left behind and should not have (O6); processes are asked of their life."""
    found = [f"O6: {path.name} is left" for path in files.checkpoints.glob("*.tmp")]
    holder = read_lease(files.lease)
    if holder is not None and not holder.released:
        found.append(f"O6: start {holder.generation} still holds the run")
    return found


def newest_saved(files: RunFiles) -> int:
    """The newest complete checkpoint, 0 if there is none."""
    return max(list_steps(files.checkpoints), default=0) if files.checkpoints.exists() else 0


def _state(files: RunFiles, step: int) -> tuple[dict[str, str], JSON]:
    checkpoint = find_checkpoint(files.checkpoints, ranks=Alone(), step=step)
    assert checkpoint is not None
    digests = {}
    for name in checkpoint.names():
        shape = checkpoint.shape_of(name)
        digests[name] = xxhash.xxh3_128_hexdigest(checkpoint.read(name, (0,) * len(shape), shape).numpy().tobytes())
    return digests, checkpoint.facts["data"]
