"""What came of a step: values that the trainer hands to whoever watches. Nothing is done here."""

from dataclasses import dataclass

from megagrok.engine.engine import StepTotals, Update


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer update, as the hooks see it; equal on all ranks."""

    step: int
    totals: StepTotals
    update: Update
    lr: float
    global_batch: int
    consumed_samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WayBack:
    """The step was bad, and the run went back to the checkpoint of an earlier one."""

    step: int
    """That earlier step."""
