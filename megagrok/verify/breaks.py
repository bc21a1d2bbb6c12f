"""Four bugs to plant, so that the check is seen to catch them. They live here: the engine has no switch for any.

Each is a mistake that shipped somewhere: expert gradients scaled by a group's size, norms whose gradients nobody summed
over the tensor ranks, a tied embedding whose two copies went apart, a norm that left out experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megagrok.config import RunConfig
from megagrok.engine.engine import Engine
from megagrok.model.names import is_norm
from megagrok.parallel.groups import ProcessGroups
from megagrok.verify.choices import BreakName


@dataclass(frozen=True, slots=True)
class Break:
    """A bug in three places where a rank can be touched; most use one of them."""

    story: str
    can_show: Callable[[RunConfig], bool]
    """Whether a run has the ranks that the bug needs."""
    in_groups: Callable[[ProcessGroups], ProcessGroups] = lambda groups: groups
    in_engine: Callable[[Engine], None] = lambda engine: None
    in_gradients: Callable[[Engine, ProcessGroups], None] = lambda engine, groups: None
    """Between the backward pass and the reduction."""


def _scale_experts(engine: Engine, groups: ProcessGroups) -> None:
    for item in engine.local_parameters:
        if item.is_expert and item.parameter.grad is not None:
            item.parameter.grad *= groups.topology.expert


def _untag_norms(engine: Engine) -> None:
    for item in engine.local_parameters:
        if is_norm(item.parts[0].name):
            item.parameter.sequence_parallel = False  # type: ignore[attr-defined]


def _untag_experts(engine: Engine) -> None:
    for item in engine.local_parameters:
        if item.is_expert:
            item.parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def _part_embeddings(groups: ProcessGroups) -> ProcessGroups:
    return replace(groups, embedding=None)


BREAKS: dict[BreakName, Break] = {
    "expert-scale": Break(
        "expert gradients are multiplied by the number of expert ranks",
        lambda run: run.parallel.expert > 1,
        in_gradients=_scale_experts,
    ),
    "sp-norm": Break(
        "gradients of the norms are not summed over the tensor ranks under sequence parallelism",
        lambda run: run.parallel.sequence,
        in_engine=_untag_norms,
    ),
    "tied-embedding": Break(
        "gradients of the tied embedding are not summed over the first and the last stage",
        lambda run: run.model.tied_embeddings and run.parallel.pipeline > 1,
        in_groups=_part_embeddings,
    ),
    "clip-norm": Break(
        "experts lack the tag by which DeepSpeed counts them on tensor ranks above 0",
        # ZeRO 0 counts by megagrok's own map, which knows no tags.
        lambda run: run.parallel.tensor > 1 and run.parallel.zero > 0,
        in_engine=_untag_experts,
    ),
}
