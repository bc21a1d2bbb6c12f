"""What a model is and costs, as numbers and as a table: the body of `megagrok describe`. Computes nothing itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megagrok.config.schema import ModelConfig, RunConfig
from megagrok.plan.batch import total_samples, world_size
from megagrok.plan.flops import CONVENTION, training_flops_per_token
from megagrok.plan.memory import StateBytes, state_bytes, weight_bytes
from megagrok.plan.params import active_params, params_by_part, total_params

MODEL_FILE_SEQ_LEN = 8192
"""Sequence length at which a model without a run is described, if its max_positions reach that far."""


@dataclass(frozen=True, slots=True)
class Description:
    """The numbers of one model; `rank_bytes` (per pipeline stage, fullest rank) only for a run, which has a layout."""

    total_params: int
    active_params: int
    parts: Mapping[str, int]
    seq_len: int
    flops_per_token: int
    convention: str
    weight_bytes_bf16: int
    world_size: int | None = None
    tokens_per_step: int | None = None
    total_tokens: int | None = None
    rank_bytes: tuple[StateBytes, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("parameters", f"{self.total_params:,}", _billions(self.total_params)),
            ("active per token", f"{self.active_params:,}", _billions(self.active_params)),
            *((f"  {part}", f"{count:,}", _billions(count)) for part, count in self.parts.items() if count),
            ("training FLOPs per token", f"{self.flops_per_token:,}", f"at seq_len {self.seq_len}"),
            ("weights in bf16", f"{self.weight_bytes_bf16:,} bytes", _gib(self.weight_bytes_bf16)),
        ]
        if self.world_size is not None:
            rows.append(("ranks", f"{self.world_size:,}", ""))
        if self.tokens_per_step is not None and self.total_tokens is not None:
            rows.append(("tokens per step", f"{self.tokens_per_step:,}", f"{self.total_tokens:,} in all"))
        for stage, size in enumerate(self.rank_bytes):
            what = f"weights {_gib(size.weights)}, gradients {_gib(size.gradients)}, optimizer {_gib(size.optimizer)}"
            rows.append((f"state per rank, stage {stage}", _gib(size.total), what))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = (f"{name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows)
        return "\n".join([*table, f"FLOPs are {self.convention}."])


def describe(model: ModelConfig, seq_len: int | None = None) -> Description:
    """The numbers of a model, in sequences of `seq_len` (null: the model's own length, at most 8192)."""
    length = min(model.max_positions, MODEL_FILE_SEQ_LEN) if seq_len is None else seq_len
    return Description(
        total_params=total_params(model),
        active_params=active_params(model),
        parts=params_by_part(model),
        seq_len=length,
        flops_per_token=training_flops_per_token(model, length),
        convention=CONVENTION,
        weight_bytes_bf16=total_params(model) * weight_bytes("bf16"),
    )


def describe_run(config: RunConfig) -> Description:
    """The numbers of a run that `megagrok.plan.check` accepts: of its model, and of its state on each stage's ranks."""
    return replace(
        describe(config.model, config.train.seq_len),
        world_size=world_size(config.parallel),
        tokens_per_step=config.train.global_batch * config.train.seq_len,
        total_tokens=total_samples(config.train) * config.train.seq_len,
        rank_bytes=state_bytes(config.model, config.parallel, config.train.precision),
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
