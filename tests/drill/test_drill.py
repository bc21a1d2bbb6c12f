"""Real faults in a real run: whatever is done to it, it comes out as the run that nobody touched. And the drill itself
sees it when a run does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megagrok.drill.campaign import Request, Trial, drill
from megagrok.drill.faults import FAULTS
from megagrok.drill.oracle import Losses, differences, expect
from megagrok.drill.report import to_json, to_markdown
from megagrok.drill.subject import make_subject
from megagrok.train.files import RunFiles
from tests.train.commands import damage

SEED = 20261123


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, dict[str, Trial]]:
    """One round of every fault of the fast tier, from one untouched run."""
    faults = ("kill", "preempt", "hang", "slow", "corrupt", "disk-full", "nan")
    request = Request(faults=faults, rounds=1, seed=SEED, folder=tmp_path_factory.mktemp("drill"))
    return request, {trial.fault: trial for trial in drill(request)}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("kill", marks=pytest.mark.fault("F1")),
        pytest.param("preempt", marks=pytest.mark.fault("F6")),
        pytest.param("hang", marks=pytest.mark.fault("F11")),
        pytest.param("slow", marks=pytest.mark.fault("F14")),
        pytest.param("corrupt", marks=[pytest.mark.fault("F17"), pytest.mark.fault("F18")]),
        pytest.param("disk-full", marks=pytest.mark.fault("F20")),
        pytest.param("nan", marks=pytest.mark.fault("F23")),
    ],
)
def test_a_run_comes_out_as_if_nothing_had_happened(drilled: tuple[Request, dict[str, Trial]], fault: str) -> None:
    trial = drilled[1][fault]
    if trial.skipped is not None:
        pytest.skip(trial.skipped)
    assert trial.problems == ()
    assert trial.rounds


def test_the_report_says_what_was_done_with_seed_machine_and_verdict(drilled: tuple[Request, dict[str, Trial]]) -> None:
    request, trials = drilled
    page = to_markdown(request, list(trials.values()))
    assert f"--seed {SEED}" in page and "cores" in page and "torch 2." in page
    whole = json.loads(to_json(request, list(trials.values())))
    assert [trial["fault"] for trial in whole["trials"]] == list(trials)
    spoilt = replace(trials["kill"], problems=("O1: step 3 has loss 1.0, untouched 2.0",))
    page = to_markdown(request, [spoilt])
    assert "| 1 problems |" in page and "- O1: step 3 has loss 1.0" in page


def test_the_oracle_sees_a_loss_a_tensor_a_sample_and_a_lease_that_are_not_as_they_should_be(
    drilled: tuple[Request, dict[str, Trial]],
) -> None:
    request, _ = drilled
    files = RunFiles(request.folder / "untouched")
    steps = 6 + 24
    expected = expect(files, steps)
    losses = Losses()
    losses.take(files)
    assert differences(files, losses, expected, steps) == []

    broken = replace(
        expected,
        losses=expected.losses | {3: expected.losses[3] * (1 + 2**-52)},
        digests=expected.digests | {next(iter(expected.digests)): "0" * 32},
        position={"consumed_samples": 0},
    )
    found = differences(files, losses, broken, steps)
    assert [problem[:2] for problem in found] == ["O1", "O2", "O2"] and "step 3 has loss" in found[0]

    losses.by_step[4] += 1.0
    losses.take(files)
    assert any(problem.startswith("O1: step 4 had loss") for problem in losses.contradictions)
    ledger = files.ledger / "data-00000.jsonl"
    before = ledger.read_bytes()
    ledger.write_bytes(b"".join(line for line in before.splitlines(True) if b'"step":5' not in line.replace(b" ", b"")))
    assert any(problem.startswith("O3") for problem in differences(files, Losses(), expected, steps))
    ledger.write_bytes(before)
    files.lease.write_text(files.lease.read_text().replace('"released": true', '"released": false'))
    assert any(
        problem.startswith("O6: start 1 still holds") for problem in differences(files, Losses(), expected, steps)
    )


def test_every_fault_can_be_asked_for_by_name() -> None:
    assert set(FAULTS) == {"kill", "hang", "slow", "preempt", "node-loss", "corrupt", "disk-full", "nan"}


def test_the_run_that_is_drilled_can_run(tmp_path: Path) -> None:
    from megagrok.config import Loaded
    from megagrok.plan import require_runnable

    require_runnable(Loaded(make_subject(tmp_path, "x", steps=30), {}))


@pytest.mark.slow
@pytest.mark.fault("F2")
def test_random_kills_leave_no_trace(tmp_path: Path) -> None:
    (trial,) = drill(Request(faults=("kill",), rounds=10, seed=SEED, folder=tmp_path))
    assert trial.problems == ()


@pytest.mark.slow
def test_damage_that_the_run_did_not_see_would_be_found(tmp_path: Path) -> None:
    """The oracle against rot in the last checkpoint: it is refused, not compared."""
    drill(Request(faults=(), rounds=1, seed=SEED, folder=tmp_path))
    files = RunFiles(tmp_path / "untouched")
    damage(next((files.checkpoints / "step-00000030").glob("rank-*")))
    with pytest.raises(Exception, match="step-00000030"):
        expect(files, 30)
