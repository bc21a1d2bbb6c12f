"""What is measured: one record per optimizer step, one per evaluation, one per step that a guard refused. Not where it
goes and not how it is reduced.

One idea: a record is exactly one line of metrics.jsonl, and back. JSON has no NaN, so a number that is not finite is
written as the text "nan", "inf" or "-inf": the line stays valid for strict readers (jq, pandas, a browser), and a
diverged run still says what it saw.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagrok.errors import DataError

JsonNumber = float | int | str
"""A number as it stands in the file: text when it is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step, reduced over all ranks."""

    step: int
    """Counts from 1: the update that was just made."""
    loss: float
    """Mean cross-entropy per token, in nats, over the global batch; without the router's losses."""
    balance_loss: float
    """Load-balancing loss, mean over layers, before its coefficient."""
    z_loss: float
    """Router z-loss, mean over layers, before its coefficient."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    clip_coefficient: float
    """What the gradient was multiplied by; 1 when it was not clipped."""
    lr: float
    """Learning rate of this update."""
    tokens: int
    """Tokens of this step, over all ranks."""
    consumed_samples: int
    """Samples consumed by the run so far, this step included."""
    global_batch: int
    """Samples in this step."""
    step_seconds: float
    """Wall time of the step, from one device sync to the next."""
    tokens_per_second: float
    """Tokens of this step by its wall time, over all ranks."""
    mfu: float | None
    """Model FLOP/s used, as a fraction of the devices' peak; None where the peak is not known."""
    expert_load: tuple[tuple[float, ...], ...]
    """For each layer, the fraction of its (token, choice) pairs that went to each expert."""

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl, `kind` first."""
        return {
            "kind": "step",
            "step": self.step,
            "loss": to_json_number(self.loss),
            "balance_loss": to_json_number(self.balance_loss),
            "z_loss": to_json_number(self.z_loss),
            "grad_norm": to_json_number(self.grad_norm),
            "clip_coefficient": to_json_number(self.clip_coefficient),
            "lr": to_json_number(self.lr),
            "tokens": self.tokens,
            "consumed_samples": self.consumed_samples,
            "global_batch": self.global_batch,
            "step_seconds": to_json_number(self.step_seconds),
            "tokens_per_second": to_json_number(self.tokens_per_second),
            "mfu": None if self.mfu is None else to_json_number(self.mfu),
            "expert_load": [[to_json_number(share) for share in layer] for layer in self.expert_load],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """One pass over the held-out samples."""

    step: int
    """Updates made before the evaluation; 0 is the untrained model."""
    loss: float
    """Mean cross-entropy per held-out token, in nats."""
    perplexity: float
    """exp(loss)."""
    tokens: int
    """Held-out tokens that were scored."""

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl, `kind` first."""
        return {
            "kind": "evaluation",
            "step": self.step,
            "loss": to_json_number(self.loss),
            "perplexity": to_json_number(self.perplexity),
            "tokens": self.tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardRecord:
    """A step that was not learnt from. It stays where it is when the run goes back before it: it did happen."""

    step: int
    """The step that was refused."""
    generation: int
    """Which start of the run."""
    decision: str
    """stop, skip or rewind."""
    reason: str
    """With the numbers."""
    loss: float
    """Of the step, as for StepRecord."""
    grad_norm: float
    """NaN if it was not computed."""
    next_step: int
    """The step that comes next; of a stopped run, when it goes on."""

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl, `kind` first."""
        return {
            "kind": "guard",
            "step": self.step,
            "generation": self.generation,
            "decision": self.decision,
            "reason": self.reason,
            "loss": to_json_number(self.loss),
            "grad_norm": to_json_number(self.grad_norm),
            "next_step": self.next_step,
        }


Record = StepRecord | EvaluationRecord | GuardRecord


def make_evaluation(*, step: int, loss: float, tokens: int) -> EvaluationRecord:
    """An evaluation with its perplexity; a loss too large for exp gives infinity, not an error."""
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return EvaluationRecord(step=step, loss=loss, perplexity=perplexity, tokens=tokens)


def parse_record(line: Mapping[str, Any], *, place: str) -> Record:
    """The record that `to_json` wrote.

    line: the decoded JSON object.  place: file and line number, for the message.
    Raises DataError for an unknown kind, a key that is missing, or a value of another type.
    """
    try:
        match line["kind"]:
            case "step":
                return _parse_step(line)
            case "evaluation":
                return EvaluationRecord(
                    step=int(line["step"]),
                    loss=float(line["loss"]),
                    perplexity=float(line["perplexity"]),
                    tokens=int(line["tokens"]),
                )
            case "guard":
                return GuardRecord(
                    step=int(line["step"]),
                    generation=int(line["generation"]),
                    decision=str(line["decision"]),
                    reason=str(line["reason"]),
                    loss=float(line["loss"]),
                    grad_norm=float(line["grad_norm"]),
                    next_step=int(line["next_step"]),
                )
            case other:
                raise DataError(f"{place}: kind is {other!r}, metrics are of kind 'step', 'evaluation' or 'guard'.")
    except KeyError as missing:
        raise DataError(f"{place}: no key {missing} (keys: {', '.join(line)}).") from missing
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: a value is not of its type: {error}.") from error


def _parse_step(line: Mapping[str, Any]) -> StepRecord:
    return StepRecord(
        step=int(line["step"]),
        loss=float(line["loss"]),
        balance_loss=float(line["balance_loss"]),
        z_loss=float(line["z_loss"]),
        grad_norm=float(line["grad_norm"]),
        clip_coefficient=float(line["clip_coefficient"]),
        lr=float(line["lr"]),
        tokens=int(line["tokens"]),
        consumed_samples=int(line["consumed_samples"]),
        global_batch=int(line["global_batch"]),
        step_seconds=float(line["step_seconds"]),
        tokens_per_second=float(line["tokens_per_second"]),
        mfu=None if line["mfu"] is None else float(line["mfu"]),
        expert_load=tuple(tuple(float(share) for share in layer) for layer in line["expert_load"]),
    )


def to_json_number(value: float) -> JsonNumber:
    """The number, or its name where JSON has none."""
    return value if math.isfinite(value) else str(float(value))
