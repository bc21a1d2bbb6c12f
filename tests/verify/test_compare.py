"""Real ranks, then one thing at a time put wrong in what they report: each is seen and named."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from verify_models import TINY

from megagrok.checkpoint import Fragment
from megagrok.config import ParallelConfig, RunConfig
from megagrok.parallel.launch import run_ranks
from megagrok.verify.compare import Row, compare
from megagrok.verify.grid import Layout
from megagrok.verify.oracle import Trajectory, quiet_twin
from megagrok.verify.run import Request
from megagrok.verify.twin import Switches
from megagrok.verify.witness import Held, RankReport, RankStep, witness

LAYOUT = Layout(ParallelConfig(data=2, expert=2, zero=1))
Seen = tuple[RunConfig, Trajectory, list[RankReport]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    run, trajectory = quiet_twin(Request(model=TINY, switches=Switches(), own=None, steps=2).twin(LAYOUT))
    return run, trajectory, run_ranks(witness, 2, run, None, 60.0, timeout_seconds=60.0)


def judge(seen: Seen, change: Callable[[int, RankStep], RankStep] | None = None) -> Row:
    """The verdict after `change` has been made to the second step of each rank."""
    run, trajectory, reports = seen
    if change is not None:
        reports = [
            replace(report, steps=[report.steps[0], change(rank, report.steps[1])])
            for rank, report in enumerate(reports)
        ]
    return compare(LAYOUT, run, trajectory, reports, seconds=0.0)


def scaled(step: RankStep, word: str, factor: float) -> RankStep:
    """The step with the gradients of all parameters with `word` in their name multiplied."""

    def scale(piece: Held) -> Held:
        fragment = piece.fragment
        return replace(piece, fragment=replace(fragment, data=fragment.data * (factor if word in fragment.name else 1)))

    return replace(step, gradients=[scale(piece) for piece in step.gradients])


def test_what_the_ranks_report_matches_the_oracle(seen: Seen) -> None:
    row = judge(seen)
    assert row.matches, row


def test_a_scaled_gradient_is_named_with_parameter_step_and_factor(seen: Seen) -> None:
    row = judge(seen, lambda rank, step: scaled(step, ".layers.2.self_attn.v_proj", 2.0))
    assert not row.matches
    assert row.differences is not None
    assert row.differences.gradient_name == "model.layers.2.self_attn.v_proj.weight"
    finding = next(finding for finding in row.findings if "v_proj" in finding.subject)
    assert (finding.step, finding.example) == (2, "model.layers.2.self_attn.v_proj.weight")
    assert finding.factor == pytest.approx(2.0, rel=1e-4)
    assert "x DP" in finding.causes


def test_a_gradient_that_never_came_is_missing(seen: Seen) -> None:
    row = judge(seen, lambda rank, step: scaled(step, "gate", 0.0))
    assert [finding.causes for finding in row.findings if "gate" in finding.subject] == [("missing: it is zero",)]


def test_a_nan_is_a_mismatch(seen: Seen) -> None:
    row = judge(seen, lambda rank, step: scaled(step, "lm_head", math.nan))
    assert not row.matches
    assert row.differences is not None
    assert "gradient" in row.differences.breaches


def test_a_norm_that_counts_experts_twice_is_told_from_wrong_gradients(seen: Seen) -> None:
    def count_twice(rank: int, step: RankStep) -> RankStep:
        _, _, reports = seen
        pieces = [
            piece for report in reports for piece in report.steps[1].gradients if ".experts." in piece.fragment.name
        ]
        square = sum(float(piece.fragment.data.double().square().sum()) for piece in pieces)
        norm = math.sqrt(step.update.grad_norm**2 + square)
        return replace(step, update=replace(step.update, grad_norm=norm))

    row = judge(seen, count_twice)
    (finding,) = row.findings
    assert finding.subject == "gradient norm, experts"
    assert "counted x EP" in finding.causes


def test_ranks_that_disagree_are_found(seen: Seen) -> None:
    row = judge(
        seen,
        lambda rank, step: replace(step, update=replace(step.update, grad_norm=step.update.grad_norm * (1 + rank))),
    )
    assert "gradient norm, which every rank should know alike" in [finding.subject for finding in row.findings]


def test_a_clip_coefficient_of_another_norm_is_a_mismatch(seen: Seen) -> None:
    row = judge(
        seen,
        lambda rank, step: replace(
            step, update=replace(step.update, clip_coefficient=step.update.clip_coefficient * 1.001)
        ),
    )
    assert row.differences is not None
    assert row.differences.breaches == ["norm"]


def test_a_miscounted_choice_is_found(seen: Seen) -> None:
    def miscount(rank: int, step: RankStep) -> RankStep:
        counts_LE = step.totals.tokens_per_expert_LE.clone()
        counts_LE[0, 0] += 1
        return replace(step, totals=replace(step.totals, tokens_per_expert_LE=counts_LE))

    assert "tokens per expert" in [finding.subject for finding in judge(seen, miscount).findings]


def test_a_wrong_update_shows_in_the_weights_alone(seen: Seen) -> None:
    run, trajectory, reports = seen

    def moved(fragment: Fragment) -> Fragment:
        return replace(fragment, data=fragment.data + 1e-4 * (fragment.name == "weight/model.norm.weight"))

    reports = [replace(report, last_weights=[moved(f) for f in report.last_weights]) for report in reports]
    row = compare(LAYOUT, run, trajectory, reports, seconds=0.0)
    assert row.differences is not None
    assert (row.differences.breaches, row.differences.weight_name) == (["weights"], "model.norm.weight")


def test_an_element_that_came_twice_or_never_fails_loudly(seen: Seen) -> None:
    run, trajectory, reports = seen
    twice = [replace(report, last_weights=[*report.last_weights, report.last_weights[0]]) for report in reports]
    with pytest.raises(AssertionError, match="elements came"):
        compare(LAYOUT, run, trajectory, twice, seconds=0.0)
    never = [replace(report, last_weights=report.last_weights[1:]) for report in reports]
    with pytest.raises(AssertionError, match=r"not on all sides: .*model.embed_tokens"):
        compare(LAYOUT, run, trajectory, never, seconds=0.0)
