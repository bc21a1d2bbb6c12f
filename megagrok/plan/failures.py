"""How often a job of many GPUs breaks, and what one break costs before training goes on. Rates are published, not ours.

The one idea: interruptions come at random, independently, at a rate that is proportional to the GPUs (a Poisson
process). That holds at thousands of GPUs and flatters small jobs: Meta's jobs of 1,024 GPUs failed every 7.9 h, four
times as often as the rate of their nodes says (arXiv:2410.21680).
"""

from dataclasses import dataclass

from megagrok.errors import ConfigError

DAY = 86_400.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class FailureRate:
    """Interruptions that nobody planned, on one published cluster."""

    name: str
    """Its name on the command line."""
    per_gpu_day: float
    source: str

    def per_day(self, gpus: int) -> float:
        """Interruptions of a job of so many GPUs in a day of running."""
        return self.per_gpu_day * gpus

    def mtbf_seconds(self, gpus: int) -> float:
        """Mean time between them."""
        return DAY / self.per_day(gpus)


RATES = (
    FailureRate(
        "llama3",
        419 / (16_384 * 54),
        "Llama 3 405B: 419 unexpected in 54 days on 16,384 H100, arXiv:2407.21783 sec. 3.3.4",
    ),
    FailureRate("rsc1", 6.50e-3 / 8, "Meta RSC-1: 6.50 per 1,000 days of a node of 8 A100, arXiv:2410.21680"),
    FailureRate("rsc2", 2.34e-3 / 8, "Meta RSC-2: 2.34 per 1,000 days of a node of 8 A100, arXiv:2410.21680"),
    FailureRate("opt", 105 / (992 * 60), "OPT-175B: 105 restarts in about 60 days on 992 A100, metaseq's chronicles"),
    FailureRate("bloom", 1 / (384 * 7), "BLOOM-176B: a GPU a week of 384 A100, bigscience's chronicles; GPUs alone"),
)
"""The first is the default: the newest, the largest, and the only one on H100."""

HANG_SHARE = 7 / 419
"""Of the interruptions, those that no process dies of: NCCL watchdog timeouts of Llama 3 405B. They are found after the
run's own `watch.step_seconds`."""
DEATH_SECONDS = 0.1
"""Until the death of a rank has ended all ranks: docs/reliability/kill.md, p99 of a hundred kills on 2 ranks."""
RESTART_SECONDS = 300.0
"""From the end of a job's ranks to ranks that read the checkpoint: queue, test of the nodes, imports, communicators.
An assumption. Ours takes 1.1 s on two CPU ranks (docs/reliability/kill.md), which says nothing about a cluster."""


def find_rate(name: str) -> FailureRate:
    """By its name on the command line. Raises ConfigError for one that is not in the table."""
    for rate in RATES:
        if rate.name == name.lower():
            return rate
    raise ConfigError(f"no failure rate of {name!r} is known; known: {', '.join(rate.name for rate in RATES)}")


def detection_seconds(hang_limit_seconds: float) -> float:
    """From a failure to the end of the job's ranks, on average over those that kill a process and those that do not."""
    return (1 - HANG_SHARE) * DEATH_SECONDS + HANG_SHARE * hang_limit_seconds
