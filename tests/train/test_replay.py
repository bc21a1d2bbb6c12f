"""A step that is replayed comes out as the run recorded it, bit by bit, and the run's folder is as it was."""

from pathlib import Path

import pytest

from megagrok.engine.engine import Engine
from megagrok.errors import EXIT_BUG, DataError
from megagrok.train.files import RunFiles
from tests.train.commands import run
from tests.train.injected import EXPERTS, SPIKES, spike_once, spoil, train_injected

LAYOUTS = {
    "experts": EXPERTS,
    "stages": ("parallel.pipeline=2", "parallel.zero=0"),
    "tensor": ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "train.precision=bf16"),
}


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "experts" else name for name in LAYOUTS]
)
def test_steps_come_out_as_they_did_and_a_fault_that_is_not_in_the_data_does_not(
    config: Path, tmp_path: Path, name: str
) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    spike = spike_once(5)

    def inject(step: int, engine: Engine) -> None:
        spike(step, engine)
        if step == 4:
            spoil(engine, float("nan"))

    train_injected(inject, config, *LAYOUTS[name], *SPIKES, "guard.on_nonfinite=skip", folder=tmp_path)
    before = contents(files.root)
    # Step 6 as it was after the way back, two steps after the checkpoint, one of which was skipped.
    done = run("replay", "runs/law", 6, folder=tmp_path)
    assert "replaying step 6 of runs/law from step-00000003: 2 steps are made again" in done.out
    assert done.out.count("as in metrics.jsonl, bit by bit") == 2
    assert "every gradient is finite on every rank" in done.out
    # Step 5 as it was before: the same samples give the same loss, but nobody multiplies the gradient now.
    done = run("replay", "runs/law", 5, folder=tmp_path, status=1)
    loss, norm = (line for line in done.out.splitlines() if line.startswith(("  loss", "  grad norm")))
    assert loss.endswith("as in bad/5.json, bit by bit") and "DIFFERS from" in norm
    assert contents(files.root) == before


def test_the_first_tensor_that_is_not_finite_is_named(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    settings = (*EXPERTS, "optimizer.lr=1.0e+30", "checkpoint.every_steps=1")
    run("train", config, *settings, folder=tmp_path, status=EXIT_BUG)
    (page,) = files.bad_step(0).parent.iterdir()
    done = run("replay", "runs/law", page.stem, folder=tmp_path)
    assert "loss       nan  as in bad/" in done.out
    for rank in range(2):
        assert f"rank {rank}: " in done.out and "the first of them lm_head.weight" in done.out


def test_a_step_that_the_run_has_not_made_is_refused(config: Path, tmp_path: Path) -> None:
    run("train", config, "train.steps=4", folder=tmp_path)
    done = run("replay", "runs/law", 5, folder=tmp_path, status=DataError.exit_code)
    assert "has no step 5: its last one is 4" in done.err
