"""A layout against the oracle: five differences, each with a tolerance, and findings that say what is wrong.

Losses and the final weights are compared with the oracle's own trajectory; gradients, their norm, the clip coefficient
and the routers' losses with the oracle at the weights that the layout had reached (oracle.py says why).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from megagrok.config import RunConfig
from megagrok.model.loss import expert_load
from megagrok.verify import tolerance
from megagrok.verify.diagnose import Finding, explain_gradients, explain_norm
from megagrok.verify.grid import Layout
from megagrok.verify.oracle import Answer, Losses, Trajectory, ask
from megagrok.verify.witness import RankReport, Step, gather

_SMALLEST_SHARE = 1.0e-4
"""A gradient below this share of the global norm is measured against the share: an expert without tokens has none."""


@dataclass(frozen=True, slots=True)
class Differences:
    """The worst of a layout, over all steps."""

    loss: float
    """Cross-entropy, absolute, against the trajectory."""
    router_losses: float
    """Balance and z-loss, relative, at the layout's own weights."""
    gradient: float
    """Of any parameter, over its own norm, at the layout's own weights."""
    gradient_name: str
    grad_norm: float
    """Relative; the clip coefficient too."""
    weight: float
    """Any weight after the last step, absolute, against the trajectory."""
    weight_name: str

    @property
    def breaches(self) -> list[str]:
        """What is outside its tolerance; written so that a nan is."""
        limits = {
            "loss": (self.loss, tolerance.LOSS),
            "router losses": (self.router_losses, tolerance.LOSS),
            "gradient": (self.gradient, tolerance.GRADIENT),
            "norm": (self.grad_norm, tolerance.GRAD_NORM),
            "weights": (self.weight, tolerance.WEIGHTS),
        }
        return [name for name, (value, limit) in limits.items() if not value <= limit]


@dataclass(frozen=True, slots=True)
class Row:
    """A layout's verdict."""

    layout: Layout
    seconds: float
    differences: Differences | None
    """None if the ranks did not get through their steps."""
    findings: list[Finding] = field(default_factory=list)
    failure: str = ""

    @property
    def matches(self) -> bool:
        """Whether the layout does the oracle's maths."""
        return self.differences is not None and not self.differences.breaches and not self.findings


def compare(layout: Layout, run: RunConfig, trajectory: Trajectory, reports: list[RankReport], seconds: float) -> Row:
    """Hold one layout against the oracle. run: the twin that its ranks trained; reports: theirs, in rank order."""
    steps, last_weights = gather(reports)
    for came in (last_weights, *(step.weights for step in steps), *(step.gradients for step in steps)):
        assert came.keys() == trajectory.weights.keys(), f"not on all sides: {came.keys() ^ trajectory.weights.keys()}"
    answers = _answers(run, steps)
    gradient, gradient_name = _worst(
        (_distance(step.gradients[name], true, answer.grad_norm), name)
        for step, answer in zip(steps, answers, strict=True)
        for name, true in answer.gradients.items()
    )
    weight, weight_name = _worst(
        (float((last_weights[name] - true).abs().max()), name) for name, true in trajectory.weights.items()
    )
    differences = Differences(
        loss=_worst((abs(_losses(step).ce - true.ce), "") for step, true in zip(steps, trajectory.losses, strict=True))[
            0
        ],
        router_losses=_worst((_router_difference(*pair), "") for pair in zip(steps, answers, strict=True))[0],
        gradient=gradient,
        gradient_name=gradient_name,
        grad_norm=_worst((_norm_difference(*pair), "") for pair in zip(steps, answers, strict=True))[0],
        weight=weight,
        weight_name=weight_name,
    )
    return Row(layout, seconds, differences, _findings(layout, steps, answers))


def _answers(run: RunConfig, steps: list[Step]) -> list[Answer]:
    """The truth of every step at the weights that the layout had before it, with the loads that it had seen."""
    answers = []
    load_LE: Tensor | None = None
    for number, step in enumerate(steps):
        answers.append(ask(run, number, step.weights, load_LE))
        load_LE = expert_load(step.totals[0].tokens_per_expert_LE)
    return answers


def _findings(layout: Layout, steps: list[Step], answers: list[Answer]) -> list[Finding]:
    """What is wrong at the first step at which it is; later steps inherit the damage."""
    for number, (step, answer) in enumerate(zip(steps, answers, strict=True), start=1):
        found = [*_disagreements(number, step), *_routing(number, step, answer)]
        wrong = [
            name
            for name, true in answer.gradients.items()
            if not _distance(step.gradients[name], true, answer.grad_norm) <= tolerance.GRADIENT
        ]
        found += explain_gradients(number, step, answer.gradients, wrong, layout.sizes)
        own_norm = math.sqrt(sum(step.squares.values()))
        if not _relative(step.updates[0].grad_norm, own_norm) <= tolerance.GRAD_NORM:
            found.append(explain_norm(number, step, layout.sizes))
        if found:
            return found
    return []


def _disagreements(number: int, step: Step) -> list[Finding]:
    """Ranks that report other losses or another norm than rank 0."""
    found = []
    for subject, values in {
        "loss": [totals.ce_sum for totals in step.totals],
        "gradient norm": [update.grad_norm for update in step.updates],
        "clip coefficient": [update.clip_coefficient for update in step.updates],
    }.items():
        others = [rank for rank, value in enumerate(values) if not _relative(value, values[0]) <= tolerance.GRAD_NORM]
        if others:
            said = f"rank {others[0]} has {values[others[0]]:.7g}, rank 0 has {values[0]:.7g}"
            found.append(Finding(f"{subject}, which every rank should know alike", number, None, (said,)))
    return found


def _routing(number: int, step: Step, answer: Answer) -> list[Finding]:
    counted = step.totals[0].tokens_per_expert_LE
    if counted.equal(answer.tokens_per_expert_LE):
        return []
    moved = int((counted - answer.tokens_per_expert_LE).abs().sum())
    total = f"{int(counted.sum())} choices counted, the oracle has {int(answer.tokens_per_expert_LE.sum())}"
    return [Finding("tokens per expert", number, None, (f"counts differ by {moved}; {total}",))]


def _losses(step: Step) -> Losses:
    totals = step.totals[0]
    return Losses.of(totals.ce_sum, totals.balance_sum, totals.z_sum, totals.num_tokens)


def _router_difference(step: Step, answer: Answer) -> float:
    mine, true = _losses(step), answer.losses
    return _worst([(_relative(mine.balance, true.balance), ""), (_relative(mine.z, true.z), "")])[0]


def _norm_difference(step: Step, answer: Answer) -> float:
    update = step.updates[0]
    norm, clip = (
        _relative(update.grad_norm, answer.grad_norm),
        _relative(update.clip_coefficient, answer.clip_coefficient),
    )
    return _worst([(norm, ""), (clip, "")])[0]


def _distance(actual: Tensor, true: Tensor, grad_norm: float) -> float:
    return float((actual - true).norm()) / max(float(true.norm()), _SMALLEST_SHARE * grad_norm)


def _relative(actual: float, true: float) -> float:
    return abs(actual - true) / abs(true) if true else abs(actual)


def _worst(values: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest, and a nan before all."""
    return max(values, key=lambda value: math.inf if math.isnan(value[0]) else value[0])
