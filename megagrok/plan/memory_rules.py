"""Whether what a rank holds through the step fits its device, told before the device is there.

A lower bound, from `memory.py`: weights, gradients and optimizer state. Activations and communication buffers come on
top, so a run that passes may still not fit; one that is refused never does.
"""

from collections.abc import Iterator

from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig
from megagrok.plan.memory import state_bytes

GIB = 2**30


def memory_problems(config: RunConfig, memory_bytes: int) -> Iterator[Problem]:
    """The fullest rank holds more than `memory_bytes`. The layout has to be one that the other rules accept."""
    stages = state_bytes(config.model, config.parallel, config.train.precision)
    fullest = max(stages, key=lambda stage: stage.total)
    if fullest.total <= memory_bytes:
        return
    parallel = config.parallel
    parts = {"weights": fullest.weights, "gradients": fullest.gradients, "optimizer": fullest.optimizer}
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    text = (
        f"a rank of stage {stages.index(fullest)} holds {_gib(fullest.total)} GiB before activations, its device has "
        f"{_gib(memory_bytes)}. Largest: {listed}."
    )
    grown = [
        Fix("parallel.zero", 1),
        *(Fix("parallel.expert", parallel.expert * factor) for factor in (2, 4, 8)),
        *(Fix("parallel.pipeline", parallel.pipeline * factor) for factor in (2, 4, 8)),
        *(Fix("parallel.tensor", parallel.tensor * factor) for factor in (2, 4, 8)),
        Fix("train.precision", "bf16"),
    ]
    yield Problem("parallel", text, tuple(grown))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"
