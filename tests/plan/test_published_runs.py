"""The planner held to published runs: laws of the comparison, and how far off the committed constants may be."""

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan_fit import START, fit, predict
from benchmarks.plan_validation import PAGE, main
from benchmarks.published_runs import RUNS, load_runs
from megagrok.plan.constants import CONSTANTS
from megagrok.plan.flops import training_flops_per_token

ALL, INCOMPLETE = load_runs()
HELD = [run for run in ALL if not run.tag]


def error(run) -> float:
    return abs(predict(run, CONSTANTS) / run.tokens_per_second - 1)


def test_every_row_is_complete_or_says_what_it_lacks() -> None:
    with RUNS.open(encoding="utf-8", newline="") as file:
        rows = len(list(csv.DictReader(file)))
    assert len(ALL) + len(INCOMPLETE) == rows == 261
    assert all(INCOMPLETE.values())
    assert len(HELD) > 130
    assert all(run.machine.gpu.name == "h100" for run in HELD)


def test_the_committed_constants_are_nearer_than_what_anyone_could_guess() -> None:
    rates = {run.line: run.tokens_per_second * training_flops_per_token(run.shape, run.layout.seq_len) for run in HELD}
    guesses = [abs(statistics.median(rates.values()) / rates[run.line] - 1) for run in HELD]
    errors = [error(run) for run in HELD]
    assert statistics.mean(errors) < 0.115
    assert statistics.mean(errors) < statistics.mean(guesses) / 3


def test_names_of_models_and_sources_decide_no_shape_and_no_time(tmp_path: Path) -> None:
    with RUNS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    renamed = tmp_path / "runs.csv"
    with renamed.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {**row, "model": f"model {i % 7}" + " hybrid" * ("hybrid" in row["model"])} for i, row in enumerate(rows)
        )
    again, _ = load_runs(renamed)
    assert [(run.shape, run.layout, run.habits) for run in again] == [
        (run.shape, run.layout, run.habits) for run in ALL
    ]


def test_runs_of_another_file_are_predicted_row_by_row(tmp_path: Path, monkeypatch, capsys) -> None:
    lines = RUNS.read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join([lines[0], lines[HELD[0].line - 1], lines[2]]) + "\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["plan_validation", "--runs", str(few)])
    main()
    told = capsys.readouterr().out
    assert HELD[0].title in told and "untagged: 1 runs" in told and "line 3 is incomplete: GPU B200" in told


@pytest.mark.slow
def test_the_committed_constants_are_those_of_the_fit() -> None:
    fitted = fit(HELD)
    for name in START:
        assert getattr(CONSTANTS, name) == pytest.approx(getattr(fitted, name), rel=0.02), name


def test_the_page_lists_every_constant_as_it_is_committed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in START:
        assert f"| {name} | {START[name][0]:.3g} |" in page


def test_a_twice_as_fast_network_never_slows_a_published_run() -> None:
    for run in HELD:
        faster = replace(run, machine=replace(run.machine, network_bandwidth=2 * run.machine.network_bandwidth))
        assert predict(faster, CONSTANTS) >= predict(run, CONSTANTS) * (1 - 1e-12)
