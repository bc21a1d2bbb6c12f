"""Bytes on the fullest rank of each pipeline stage at the peak of a step."""

from megagrok.plan.estimate import StageBytes
from megagrok.plan.shape import Habits, Layout, Shape


def stage_memory(shape: Shape, layout: Layout, habits: Habits) -> tuple[StageBytes, ...]:
    """For each stage, first to last."""
    params = shape.layers * (shape.attention_params + 3 * shape.hidden * shape.expert_ffn * shape.experts)
    held = params // (layout.tensor * layout.pipeline)
    return tuple(
        StageBytes(2 * held, 4 * held, 12 * held // layout.data, 10**9, 10**9, 10**9, 10**9, 10**9, 2 * 10**9)
        for _ in range(layout.pipeline)
    )
