"""The layouts that verify-layout tries: each axis alone, then those pairs and crowds in which factors go wrong."""

from dataclasses import dataclass, replace

from megagrok.config import ModelConfig, ParallelConfig
from megagrok.plan import stage_ranks, world_size
from megagrok.verify.choices import GridName
from megagrok.verify.twin import num_twin_experts

MOST_RANKS = 8
_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to spread the twin over ranks."""

    parallel: ParallelConfig
    micro_batch: int = 1
    is_own: bool = False
    """The user's own layout, shrunk."""

    @property
    def num_ranks(self) -> int:
        """Processes it takes."""
        return world_size(self.parallel)

    @property
    def num_layers(self) -> int:
        """Layers of the twin: four, or one for each chunk where there are more chunks."""
        return max(_LAYERS, self.parallel.pipeline * self.parallel.virtual_pipeline)

    @property
    def sizes(self) -> dict[str, int]:
        """What a wrong factor could be made of: the axes above 1 by their short names."""
        p = self.parallel
        named = {
            "EP": p.expert,
            "TP": p.tensor,
            "DP": p.data,
            "CP": p.context,
            "PP": p.pipeline,
            "expert replicas": stage_ranks(p) // p.expert,
        }
        return {name: size for name, size in named.items() if size > 1}

    def __str__(self) -> str:
        p = self.parallel
        words = [f"TP{p.tensor}" + "+SP" * p.sequence] if p.tensor > 1 else []
        words += [f"{name}{size}" for name, size in self.sizes.items() if name in ("CP", "DP", "PP")]
        words += [f"VPP{p.virtual_pipeline}"] if p.virtual_pipeline > 1 else []
        words += [f"EP{p.expert}({self._expert_axes()})"] if p.expert > 1 else []
        words += [f"zero{p.zero}"] + ([f"mb{self.micro_batch}"] if self.micro_batch > 1 else [])
        return ("own: " if self.is_own else "") + " ".join(words)

    def _expert_axes(self) -> str:
        """The axes whose ranks share out the experts: expert ranks are consecutive, tensor ranks first."""
        crossed, reached = [], 1
        for name, size in (("TP", self.parallel.tensor), ("CP", self.parallel.context), ("DP", self.parallel.data)):
            if size > 1 and reached < self.parallel.expert:
                crossed.append(name)
            reached *= size
        return "x".join(crossed)


def layouts_of(grid: GridName, model: ModelConfig, own: ParallelConfig | None) -> list[Layout]:
    """The grid, without layouts that need more experts than the twin has, and with the user's own one first."""
    tried = _QUICK if grid == "quick" else _DEFAULT
    possible = [layout for layout in tried if layout.parallel.expert <= num_twin_experts(model)]
    if own is None:
        return possible
    shrunk = shrink_layout(own)
    return [shrunk, *(layout for layout in possible if replace(layout, is_own=True) != shrunk)]


def shrink_layout(own: ParallelConfig) -> Layout:
    """The user's layout on at most eight ranks: every axis above 1 becomes 2, and the last of them give way.

    Experts stay spread as they were: inside the tensor ranks, or over ranks beyond them.
    """
    tensor, pipeline, data, context = (min(size, 2) for size in (own.tensor, own.pipeline, own.data, own.context))
    if tensor * pipeline * data * context > MOST_RANKS:
        data = 1
    stage = tensor * context * data
    reach = min(own.expert, 2) if own.expert <= own.tensor * own.context else min(own.expert, 4)
    expert = max(size for size in (1, 2, 4) if stage % size == 0 and size <= reach)
    return Layout(
        replace(
            own,
            tensor=tensor,
            sequence=own.sequence and tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=min(own.virtual_pipeline, 2) if pipeline > 1 else 1,
            context=context,
            data=data,
            expert=expert,
        ),
        is_own=True,
    )


_QUICK = [
    Layout(ParallelConfig(data=2, zero=0)),
    Layout(ParallelConfig(tensor=2, zero=1)),
    Layout(ParallelConfig(tensor=2, sequence=True, expert=2, zero=1)),
    Layout(ParallelConfig(context=2, zero=1), micro_batch=2),
    Layout(ParallelConfig(pipeline=2, virtual_pipeline=2, zero=1)),
    Layout(ParallelConfig(data=4, expert=2, zero=2)),
    Layout(ParallelConfig(tensor=2, sequence=True, pipeline=2, data=2, expert=4, zero=1)),
]

_DEFAULT = [
    Layout(ParallelConfig(zero=0)),
    Layout(ParallelConfig(zero=1), micro_batch=2),
    # data and ZeRO
    Layout(ParallelConfig(data=2, zero=0)),
    Layout(ParallelConfig(data=2, zero=1)),
    Layout(ParallelConfig(data=2, zero=2), micro_batch=2),
    # tensor and sequence
    Layout(ParallelConfig(tensor=2, zero=0)),
    Layout(ParallelConfig(tensor=2, zero=1)),
    Layout(ParallelConfig(tensor=2, sequence=True, zero=1)),
    Layout(ParallelConfig(tensor=4, sequence=True, zero=1)),
    # pipeline
    Layout(ParallelConfig(pipeline=2, zero=0)),
    Layout(ParallelConfig(pipeline=4, zero=1), micro_batch=2),
    Layout(ParallelConfig(pipeline=2, virtual_pipeline=2, zero=1)),
    Layout(ParallelConfig(pipeline=4, virtual_pipeline=2, zero=1)),
    # context
    Layout(ParallelConfig(context=2, zero=1)),
    Layout(ParallelConfig(context=2, tensor=2, sequence=True, zero=0), micro_batch=2),
    # experts over data ranks
    Layout(ParallelConfig(data=2, expert=2, zero=0)),
    Layout(ParallelConfig(data=2, expert=2, zero=1), micro_batch=2),
    Layout(ParallelConfig(data=2, expert=2, zero=2)),
    Layout(ParallelConfig(data=4, expert=2, zero=1)),
    Layout(ParallelConfig(context=2, data=2, expert=4, zero=1)),
    # experts over tensor ranks
    Layout(ParallelConfig(tensor=2, sequence=True, expert=2, zero=1)),
    Layout(ParallelConfig(tensor=4, sequence=True, expert=4, zero=0)),
    Layout(ParallelConfig(tensor=2, sequence=True, data=2, expert=2, zero=2)),
    # experts over tensor and data ranks
    Layout(ParallelConfig(tensor=2, sequence=True, data=2, expert=4, zero=1), micro_batch=2),
    Layout(ParallelConfig(tensor=2, sequence=True, data=4, expert=8, zero=2)),
    # crowds
    Layout(ParallelConfig(pipeline=2, data=2, expert=2, zero=0)),
    Layout(ParallelConfig(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, expert=2, zero=1)),
    Layout(ParallelConfig(tensor=2, sequence=True, pipeline=2, data=2, expert=2, zero=1)),
    Layout(ParallelConfig(tensor=2, sequence=True, pipeline=2, data=2, expert=4, zero=0)),
    Layout(ParallelConfig(tensor=2, sequence=True, context=2, pipeline=2, expert=4, zero=1)),
]
