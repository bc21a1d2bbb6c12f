"""Records to write, for the tests of this folder."""

from collections.abc import Callable

import pytest

from megagrok.telemetry.records import StepRecord

MakeStep = Callable[..., StepRecord]


@pytest.fixture
def make_step() -> MakeStep:
    """A plausible record of any step; `mfu`, `loss` and `expert_load` can be chosen."""

    def make(
        step: int,
        *,
        loss: float = 5.0,
        mfu: float | None = 0.25,
        expert_load: tuple[tuple[float, ...], ...] = ((0.5, 0.25, 0.25, 0.0), (0.25, 0.25, 0.25, 0.25)),
    ) -> StepRecord:
        return StepRecord(
            step=step,
            loss=loss,
            balance_loss=1.0,
            z_loss=0.1,
            grad_norm=1.5,
            clip_coefficient=1 / 1.5,
            lr=1e-3,
            tokens=1024,
            consumed_samples=8 * step,
            global_batch=8,
            step_seconds=0.5,
            tokens_per_second=2048.0,
            mfu=mfu,
            expert_load=expert_load,
        )

    return make
