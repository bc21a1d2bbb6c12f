"""What one layout costs: bytes on the fullest rank of each pipeline stage, seconds of a step, the share of the peak."""

from megagrok.plan.constants import CONSTANTS, Constants
from megagrok.plan.cost import Estimate, Machine, StageBytes, StepSeconds
from megagrok.plan.flops import mfu, recomputed_flops_per_token, training_flops_per_token
from megagrok.plan.shape import MEGAGROK, Habits, Layout, Shape
from megagrok.plan.stage_memory import stage_memory
from megagrok.plan.step_time import step_seconds

__all__ = ["Estimate", "Machine", "StageBytes", "StepSeconds", "estimate"]


def estimate(
    shape: Shape, layout: Layout, machine: Machine, habits: Habits = MEGAGROK, constants: Constants = CONSTANTS
) -> Estimate:
    """Bytes and seconds of one step. The layout has to be one that the model divides into (`check`, `search`)."""
    seconds = step_seconds(shape, layout, machine, habits, constants)
    speed = layout.tokens / seconds.total
    peak = layout.world_size * machine.gpu.peak(layout.precision)
    model_flops = training_flops_per_token(shape, layout.seq_len)
    again = recomputed_flops_per_token(shape, layout.seq_len, layout.recompute)
    return Estimate(
        layout=layout,
        stages=stage_memory(shape, layout, habits),
        seconds=seconds,
        tokens_per_second=speed,
        mfu=mfu(speed, model_flops, peak),
        hfu=mfu(speed, model_flops + again, peak),
    )
