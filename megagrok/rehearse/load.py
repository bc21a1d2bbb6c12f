"""How many tokens go to which expert in a rehearsal: evenly, or a given share to the fullest one. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagrok.config.schema import MoEConfig
from megagrok.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """fullest: share of all choices that goes to one expert, the first of this rank's; the others share the rest
    evenly. All ranks route alike."""

    num_experts: int
    expert_ranks: int
    expert_rank: int
    fullest: float

    @classmethod
    def of(cls, moe: MoEConfig, expert_ranks: int, expert_rank: int, fullest: float | None) -> "Load":
        """fullest: None is balanced. Raises ConfigError for a share that no routing has."""
        lowest, highest = 1 / moe.num_experts, 1 / moe.top_k
        if fullest is not None and not lowest <= fullest <= highest:
            raise ConfigError(
                f"--load {fullest:g}, needs a share between {lowest:.4g} (balanced over {moe.num_experts} experts) and "
                f"{highest:.4g} (every token's choice, one of its {moe.top_k}), or balanced"
            )
        return cls(moe.num_experts, expert_ranks, expert_rank, lowest if fullest is None else fullest)

    @property
    def _local(self) -> range:
        each = self.num_experts // self.expert_ranks
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)

    def outgoing(self, choices: int) -> list[int]:
        """Of each expert, from one rank; sums to `choices`."""
        favourite = round(choices * self.fullest)
        others = self.num_experts - 1
        if not others:
            return [choices]
        each, more = divmod(choices - favourite, others)
        # The favourite is first, so that what does not divide goes to the experts after it.
        turned = [favourite, *(each + (index < more) for index in range(others))]
        first = self._local.start
        return [turned[(expert - first) % self.num_experts] for expert in range(self.num_experts)]

    def incoming(self, sent: Sequence[int]) -> list[int]:
        """What this rank's experts get from each rank in turn, if every rank sends what this one does."""
        return [sent[expert] for expert in self._local] * self.expert_ranks

    def __str__(self) -> str:
        if self.fullest * self.num_experts == 1:
            return "balanced"
        return f"{self.fullest:.3g} of all choices to one expert of this rank"
