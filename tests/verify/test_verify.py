"""Law 1: no layout of the grid changes the maths. And the check that says so catches four bugs that did."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from verify_models import GROK2, KINDS, TINY

from megagrok.cli import main
from megagrok.engine.engine import Engine
from megagrok.verify import report
from megagrok.verify.breaks import BREAKS, Break
from megagrok.verify.run import Request, verify
from megagrok.verify.twin import Switches

CONFIG = str(Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml")


def test_no_layout_of_the_quick_grid_changes_the_maths() -> None:
    rows = verify(Request(model=replace(GROK2, dropout=0.1), switches=Switches(), own=None, grid="quick", steps=2))
    assert all(row.matches for row in rows), "\n".join(report.line(row) for row in rows if not row.matches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_layout_of_the_default_grid_changes_the_maths(kind: str) -> None:
    rows = verify(Request(model=KINDS[kind], switches=Switches(), own=None))
    assert len(rows) >= 24
    assert all(row.matches for row in rows), "\n".join(report.line(row) for row in rows if not row.matches)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_the_maths_of_no_layout(recompute: str) -> None:
    model = replace(GROK2, dropout=0.1)
    rows = verify(Request(model=model, switches=Switches(recompute=recompute), own=None, grid="quick"))
    assert all(row.matches for row in rows), "\n".join(report.line(row) for row in rows if not row.matches)


@pytest.mark.parametrize(
    ("planted", "subject", "cause"),
    [
        ("expert-scale", "experts", "x EP"),
        ("sp-norm", "norms", "not summed over the tensor ranks, each of which has only its part"),
        (
            "tied-embedding",
            "model.embed_tokens.weight",
            "not summed over the first and the last stage, each of which has only its part",
        ),
        ("clip-norm", "gradient norm, experts", "missing on tensor ranks > 0"),
    ],
)
def test_a_planted_bug_is_caught_wherever_it_can_show_and_named(planted: str, subject: str, cause: str) -> None:
    request = Request(model=TINY, switches=Switches(), own=None, grid="quick", steps=1, planted=planted)
    rows = verify(request)
    for row in rows:
        assert not row.matches, str(row.layout)
        assert [(finding.subject, cause in finding.causes) for finding in row.findings] == [(subject, True)]
    said = report.closing(request, rows)
    assert f"{planted}: caught on {len(rows)} of {len(rows)} layouts where it can show." in said
    assert f"{subject}: {cause} (on {len(rows)} layouts)" in said


def test_the_command_ends_with_1_when_a_bug_is_planted_and_tells_machines_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["parallel.pipeline=2", "train.evaluate_samples=8"]
    command = ["verify-layout", CONFIG, *overrides, "--grid", "quick", "--steps", "1", "--break", "tied-embedding"]
    assert main([*command, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["planted"] == "tied-embedding"
    assert told["num_mismatches"] == len(told["layouts"]) == 3
    assert [layout["is_own"] for layout in told["layouts"]] == [True, False, False]
    assert {finding["example"] for layout in told["layouts"] for finding in layout["findings"]} == {
        "model.embed_tokens.weight"
    }


def test_ranks_that_die_are_a_mismatch_and_no_end_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(engine: Engine) -> None:
        raise ValueError("planted death")

    monkeypatch.setitem(BREAKS, "sp-norm", Break("ranks die", BREAKS["sp-norm"].can_show, in_engine=die))
    rows = verify(Request(model=TINY, switches=Switches(), own=None, grid="quick", steps=1, planted="sp-norm"))
    assert [row.matches for row in rows] == [False, False]
    assert all("planted death" in row.failure and "planted death" in report.line(row) for row in rows)
