"""Seconds of one step on the critical path, by what they go to."""

from megagrok.plan.estimate import Machine, StepSeconds
from megagrok.plan.shape import Habits, Layout, Shape


def step_seconds(shape: Shape, layout: Layout, machine: Machine, habits: Habits) -> StepSeconds:
    """Fit to nothing yet."""
    per_token = 6 * shape.layers * (shape.attention_params + 3 * shape.hidden * shape.expert_ffn * shape.top_k)
    matmul = layout.tokens * per_token / (layout.world_size * machine.gpu.bf16_flops * 0.5)
    return StepSeconds(matmul, 0.1, 0.1, 0.0, 0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.0, 0.2, 0.1)
