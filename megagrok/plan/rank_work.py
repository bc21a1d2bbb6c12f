"""What one rank of a stage does in a step: FLOPs and bytes on the wire, added up over its layers from `work.py`.

The side of the plan that `megagrok rehearse` counts in the real code, so both are in its words: for one micro-batch by
group and direction, and once a step.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megagrok.plan.memory import stage_layers
from megagrok.plan.shape import Habits, Layout, Shape
from megagrok.plan.work import ATTENTION_PASSES, Message, Slice, embedding_work, head_work, layer_work, update_messages


@dataclass(frozen=True, slots=True)
class RankWork:
    """FLOPs are of one micro-batch; so are the bytes, by group, as `work.Message` counts them, but for `once`."""

    forward_flops: float
    backward_flops: float
    recompute_flops: float
    micro_batch: dict[str, float]
    once: dict[str, float]
    """Gradients and new weights, once a step."""

    @property
    def flops(self) -> float:
        """In all directions."""
        return self.forward_flops + self.backward_flops + self.recompute_flops


def rank_work(shape: Shape, layout: Layout, habits: Habits, stage: int) -> RankWork:
    """Of any rank of pipeline stage `stage`, if routing is balanced."""
    part = Slice.of(layout)
    layers = stage_layers(shape, layout.pipeline, stage)
    works = [
        *[layer_work(shape, part, habits, False)] * layers.dense,
        *[layer_work(shape, part, habits, True)] * layers.expert,
    ]
    ends = [embedding_work(shape, part)] if stage == 0 else []
    ends += [head_work(shape, part)] if stage == layout.pipeline - 1 else []
    matmuls, attention = (
        sum(work.matmul_flops for work in (*works, *ends)),
        sum(work.attention_flops for work in works),
    )
    # Gradients that the forward pass makes already.
    early = 2 * sum(work.matmul_flops for work in ends if work.makes_gradients_forward)
    again = {
        "none": 0.0,
        "selective": sum(work.attention_flops for work in works),
        "full": sum(work.matmul_flops + work.attention_flops for work in works),
    }[layout.recompute]
    moved: defaultdict[str, float] = defaultdict(float)
    for work in (*works, *ends):
        _add(moved, (*work.forward, *work.backward))
    if layout.recompute == "full":
        for work in works:
            _add(moved, work.forward)
    if layout.pipeline > 1:
        moved["pipeline"] += _sent_bytes(shape, layout, part, stage)
    once: defaultdict[str, float] = defaultdict(float)
    _add(once, update_messages(shape, layout, habits, stage))
    return RankWork(
        matmuls + attention + early,
        2 * matmuls + (ATTENTION_PASSES - 1) * attention - early,
        again,
        dict(moved),
        dict(once),
    )


def _sent_bytes(shape: Shape, layout: Layout, part: Slice, stage: int) -> float:
    """Hidden states to the next stage and their gradients to the one before, from each chunk that has such a stage."""
    chunks = layout.virtual_pipeline
    sends = chunks - (stage == layout.pipeline - 1) + chunks - (stage == 0)
    return sends * part.own_tokens * shape.hidden * part.element_bytes


def _add(sums: defaultdict[str, float], messages: Iterable[Message]) -> None:
    for message in messages:
        sums[message.group] += message.size * message.calls
