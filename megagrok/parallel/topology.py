"""The one truth for who is where: rank <-> coordinates, and the ranks of every group. Pure arithmetic, no torch.

Ranks are numbered tensor first, then context, then data, then pipeline:

    rank = tensor + T * (context + C * (data + D * pipeline))

so that the ranks that talk most sit on one node. A pipeline stage is T*C*D consecutive ranks. Experts live on
`expert` consecutive ranks of a stage (tensor ranks first) and are never split; ranks that hold the same experts form
an expert-data group. This is Megatron-core's order "tp-cp-ep-dp-pp" with expert tensor size 1, and DeepSpeed's
expert-and-data layout; `groups.py` proves both at start.
"""

from dataclasses import dataclass
from typing import Literal

from megagrok.config.schema import ParallelConfig
from megagrok.errors import TopologyError

Axis = Literal["tensor", "context", "data", "pipeline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where one rank stands on every axis."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_data: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Sizes of the axes. Raises TopologyError if the experts' ranks do not fill a stage evenly."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if self.stage_size % self.expert:
            raise TopologyError(
                f"parallel.expert = {self.expert}, needs a divisor of tensor * context * data = {self.stage_size}"
            )

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Topology":
        """The topology that a configuration asks for."""
        return cls(
            tensor=parallel.tensor,
            context=parallel.context,
            data=parallel.data,
            pipeline=parallel.pipeline,
            expert=parallel.expert,
        )

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.stage_size * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands. Raises TopologyError outside 0 .. world_size - 1."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is outside 0 .. {self.world_size - 1}")
        in_stage = rank % self.stage_size
        return Coordinates(
            tensor=rank % self.tensor,
            context=rank // self.tensor % self.context,
            data=rank // (self.tensor * self.context) % self.data,
            pipeline=rank // self.stage_size,
            expert=in_stage % self.expert,
            expert_data=in_stage // self.expert,
        )

    def groups(self, *axes: Axis) -> list[list[int]]:
        """All groups whose ranks differ only on `axes`, each in rank order, ordered by first rank."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            every: dict[Axis, int] = {
                "tensor": place.tensor,
                "context": place.context,
                "data": place.data,
                "pipeline": place.pipeline,
            }
            groups.setdefault(tuple(value for axis, value in every.items() if axis not in axes), []).append(rank)
        return sorted(groups.values())

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold every expert of their stage once."""
        return [list(range(start, start + self.expert)) for start in range(0, self.world_size, self.expert)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks of one stage that hold the same experts."""
        return [
            list(range(start + expert, start + self.stage_size, self.expert))
            for start in range(0, self.world_size, self.stage_size)
            for expert in range(self.expert)
        ]
