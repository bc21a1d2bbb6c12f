"""What a run of known speed costs: days, GPU-hours, energy, money. Not what a GPU-hour costs: rates are the user's.

Energy is an upper bound: every board at its limit, every server at its rated maximum.
"""

from dataclasses import dataclass

from megagrok.plan.constants import PUE, SERVER_FACTOR
from megagrok.plan.gpus import Gpu

SECONDS_PER_HOUR = 3600
HOURS_PER_DAY = 24


@dataclass(frozen=True, slots=True)
class Bill:
    """The whole run, at its full batch and without interruptions."""

    tokens: int
    days: float
    gpu_hours: float
    megawatts: float
    """Of the site, at most."""
    megawatt_hours: float
    """At most."""
    dollars: float | None
    """For the GPU-hours; None without a rate."""
    power_dollars: float | None
    """For the energy, at most; None without a rate."""


def bill(
    gpu: Gpu,
    num_gpus: int,
    tokens: int,
    tokens_per_second: float,
    dollars_per_gpu_hour: float | None = None,
    dollars_per_kilowatt_hour: float | None = None,
) -> Bill:
    """What `tokens` cost on `num_gpus` GPUs that together take `tokens_per_second`."""
    hours = tokens / tokens_per_second / SECONDS_PER_HOUR
    megawatts = num_gpus * gpu.power_watts * SERVER_FACTOR * PUE / 1e6
    return Bill(
        tokens=tokens,
        days=hours / HOURS_PER_DAY,
        gpu_hours=hours * num_gpus,
        megawatts=megawatts,
        megawatt_hours=megawatts * hours,
        dollars=None if dollars_per_gpu_hour is None else hours * num_gpus * dollars_per_gpu_hour,
        power_dollars=None
        if dollars_per_kilowatt_hour is None
        else megawatts * hours * 1e3 * dollars_per_kilowatt_hour,
    )
