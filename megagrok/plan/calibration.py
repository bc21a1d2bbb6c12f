"""Factors by which measured runs of ours were slower than predicted, on one kind of device, in a small JSON file.

Not a refit of the constants: two numbers at most, one for computing and one for communication. The second is told from
the first only if the runs differ in how much they communicate; if they do not, one factor holds for both, and the file
says so. A calibration is refused on another device, and once the constants that it corrects have changed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from megagrok.errors import ConfigError
from megagrok.plan.constants import CONSTANTS
from megagrok.plan.estimate import StepSeconds
from megagrok.plan.gpus import Gpu, find_gpu

FORMAT = 1
COMMUNICATION = ("tensor", "context", "expert", "pipeline", "data")
"""The parts of StepSeconds that the second factor corrects; the others follow the first."""
LEAST_CONTRAST = 0.2
"""Runs tell the two factors apart if the predicted shares of communication differ by this much."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run beside its prediction."""

    name: str
    ranks: int
    steps: int
    """Over which the median was taken."""
    measured_seconds: float
    predicted: StepSeconds

    @property
    def communication(self) -> float:
        """Predicted seconds of communication."""
        parts = asdict(self.predicted)
        return float(sum(parts[name] for name in COMMUNICATION))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured over predicted seconds. `gpu` is the device: of the table, or a CPU with the peak that was measured."""

    gpu: Gpu
    compute: float
    communication: float
    told_apart: bool
    """False: one factor for both, because the runs communicate alike or too little."""
    runs: tuple[Measured, ...]

    def correct(self, seconds: StepSeconds) -> StepSeconds:
        """`seconds` as the measured runs would have it."""
        factors = {
            field.name: self.communication if field.name in COMMUNICATION else self.compute for field in fields(seconds)
        }
        return replace(seconds, **{name: value * factors[name] for name, value in asdict(seconds).items()})

    def error(self, run: Measured) -> float:
        """Corrected over measured seconds, less 1."""
        return self.correct(run.predicted).total / run.measured_seconds - 1

    def require_gpu(self, name: str | None) -> None:
        """Raise ConfigError if `name` is another device than the one that was measured."""
        if name is not None and name.lower() != self.gpu.name:
            raise ConfigError(
                f"--calibration was measured on {self.gpu.name}, --gpu is {name}: factors of one device say nothing "
                f"about another. Fix: --gpu {self.gpu.name}, or no --calibration."
            )


def calibrate(gpu: Gpu, runs: Sequence[Measured]) -> Calibration:
    """The factors that make the relative errors of `runs` smallest, in least squares."""
    assert runs, "nothing was measured"
    shares = [run.communication / run.predicted.total for run in runs]
    if max(shares) - min(shares) >= LEAST_CONTRAST:
        compute, communication = _two_factors(runs)
        if compute > 0 and communication > 0:
            return Calibration(gpu, compute, communication, True, tuple(runs))
    ratios = [run.predicted.total / run.measured_seconds for run in runs]
    factor = sum(ratios) / sum(ratio * ratio for ratio in ratios)
    return Calibration(gpu, factor, factor, False, tuple(runs))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Put it in `path`, which must not exist."""
    page = {"format": FORMAT, "constants": constants_mark(), **asdict(calibration)}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(page, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def read_calibration(path: Path) -> Calibration:
    """What `write_calibration` wrote.  Raises ConfigError if it is no such file, or one that is out of date."""
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
        if page["format"] != FORMAT or page["constants"] != constants_mark():
            raise ConfigError(
                f"{path} corrects other constants than this megagrok has. "
                "Make it again: megagrok plan --calibrate RUN..."
            )
        return _calibration_of(page)
    except OSError as error:
        raise ConfigError(f"--calibration {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no calibration: megagrok plan --calibrate RUN... writes one") from error


def constants_mark() -> str:
    """Changes with the constants."""
    return sha256(repr(astuple(CONSTANTS)).encode()).hexdigest()[:16]


def _calibration_of(page: dict[str, Any]) -> Calibration:
    gpu = Gpu(**{**page["gpu"], "marks": tuple(page["gpu"]["marks"])})
    runs = tuple(Measured(**{**run, "predicted": StepSeconds(**run["predicted"])}) for run in page["runs"])
    compute, communication = float(page["compute"]), float(page["communication"])
    if not (compute > 0 and communication > 0 and runs):
        raise ValueError("no factors")
    known = gpu if gpu.name == "cpu" else find_gpu(gpu.name)
    return Calibration(known, compute, communication, page["told_apart"] is True, runs)


def _two_factors(runs: Sequence[Measured]) -> tuple[float, float]:
    """Least squares of compute * a + communication * b = measured, each run weighted by 1 / measured."""
    aa = ab = bb = a1 = b1 = 0.0
    for run in runs:
        b = run.communication / run.measured_seconds
        a = run.predicted.total / run.measured_seconds - b
        aa, ab, bb, a1, b1 = aa + a * a, ab + a * b, bb + b * b, a1 + a, b1 + b
    determinant = aa * bb - ab * ab
    if determinant <= 0:
        return 0.0, 0.0
    return (a1 * bb - b1 * ab) / determinant, (aa * b1 - ab * a1) / determinant
