"""What the plan says of the same rank, beside what the rehearsal counted, and how far apart the two may be."""

from dataclasses import dataclass, replace

from megagrok.config.schema import RunConfig
from megagrok.plan.rank_work import rank_work
from megagrok.plan.shape import MEGAGROK, Layout, Shape
from megagrok.plan.stage_memory import stage_memory
from megagrok.rehearse.rehearsal import Rehearsal
from megagrok.rehearse.walk import as_walked

WORK_BOUND = 0.03
"""Of FLOPs, messages and state."""
ACTIVATION_BOUND = 0.10
"""Of the activation peak."""
_SMALL_BYTES = 65536
"""Below it a message is a count or a norm, which the plan leaves out."""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity, of one micro-batch or at the peak of the step."""

    name: str
    unit: str
    counted: float
    planned: float
    bound: float

    @property
    def deviation(self) -> float:
        """Of the plan, as a share of what was counted; 0 where both are none, infinite where one is."""
        if self.counted == self.planned:
            return 0.0
        return self.planned / self.counted - 1 if self.counted else float("inf")

    @property
    def holds(self) -> bool:
        """Whether the plan is within its bound."""
        return abs(self.deviation) <= self.bound


def against_plan(run: RunConfig, found: Rehearsal) -> list[Row]:
    """Of a rehearsal with balanced routing, which is what the plan's FLOPs stand for; fp8 was walked in bf16, and is
    planned so."""
    shape, layout = Shape.of(run.model), Layout.of(as_walked(run))
    habits = replace(MEGAGROK, routing="balanced", on_cpu=True)
    work, memory = rank_work(shape, layout, habits, found.stage), stage_memory(shape, layout, habits)[found.stage]
    computing = found.forward_backward
    rows = [
        Row("forward FLOPs", "FLOPs", found.total_flops("forward"), work.forward_flops, WORK_BOUND),
        Row("backward FLOPs", "FLOPs", found.total_flops("backward"), work.backward_flops, WORK_BOUND),
        Row("recomputed FLOPs", "FLOPs", found.total_flops("recompute"), work.recompute_flops, WORK_BOUND),
    ]
    for group in ("tensor", "context", "expert"):
        rows.append(_traffic(f"{group} traffic", found.traffic_bytes(group), work.micro_batch.get(group, 0.0)))
    sent = sum(part.size for part in found.traffic if part.group == "pipeline" and part.op == "send")
    rows.append(_traffic("pipeline traffic, sent", sent, work.micro_batch.get("pipeline", 0.0)))
    for group in ("data", "expert_data"):
        rows.append(_traffic(f"{group} traffic, once", found.traffic_bytes(group, "once"), work.once.get(group, 0.0)))
    rows += [
        Row("weights", "bytes", computing.weights, memory.weights, WORK_BOUND),
        Row("gradients", "bytes", computing.gradients, memory.gradients, WORK_BOUND),
        Row("optimizer", "bytes", computing.optimizer, memory.optimizer, WORK_BOUND),
        Row(
            "activation peak",
            "bytes",
            computing.working,
            memory.activations + memory.transient + memory.logits,
            ACTIVATION_BOUND,
        ),
        Row("all at the peak", "bytes", found.peak.total, memory.allocated, ACTIVATION_BOUND),
    ]
    return [row for row in rows if row.counted or row.planned]


def _traffic(name: str, counted: float, planned: float) -> Row:
    is_none = counted < _SMALL_BYTES and planned == 0
    return Row(name, "bytes", 0.0 if is_none else counted, planned, WORK_BOUND)
