"""Whether a run fits its device, told before the device is there.

Refused on what is sure: the state of a rank and what its layers keep for the backward pass, if every expert got the
same number of tokens. Working memory of a pass, skew of the routing, communicators and the allocator's slack come on
top (`stage_memory.py`), so a run that passes may still not fit; one that is refused never does.
"""

from collections.abc import Iterator

from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig
from megagrok.plan.cost import StageBytes
from megagrok.plan.shape import Layout, Shape, habits_of
from megagrok.plan.stage_memory import stage_memory

GIB = 2**30


def memory_problems(config: RunConfig, memory_bytes: int) -> Iterator[Problem]:
    """The fullest rank holds more than `memory_bytes`. The layout has to be one that the other rules accept."""
    stages = stage_memory(Shape.of(config.model), Layout.of(config), habits_of(config.kernels))
    fullest = max(stages, key=sure_bytes)
    if sure_bytes(fullest) <= memory_bytes:
        return
    parallel = config.parallel
    parts = {
        "weights": fullest.weights,
        "gradients": fullest.gradients,
        "optimizer": fullest.optimizer,
        "activations": fullest.activations,
    }
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    text = (
        f"a rank of stage {stages.index(fullest)} holds {_gib(sure_bytes(fullest))} GiB before its first backward "
        f"pass, its device has {_gib(memory_bytes)}. Largest: {listed}."
    )
    grown = [
        Fix("parallel.zero", 1),
        *(Fix("train.recompute", recompute) for recompute in ("selective", "full")),
        *(Fix("parallel.expert", parallel.expert * factor) for factor in (2, 4, 8)),
        *(Fix("parallel.pipeline", parallel.pipeline * factor) for factor in (2, 4, 8)),
        *(Fix("parallel.tensor", parallel.tensor * factor) for factor in (2, 4, 8)),
        Fix("train.micro_batch", 1),
        Fix("train.precision", "bf16"),
    ]
    yield Problem("parallel", text, tuple(grown))


def sure_bytes(stage: StageBytes) -> int:
    """What a rank of the stage holds at least, just before a backward pass."""
    return stage.weights + stage.gradients + stage.optimizer + stage.activations


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"
