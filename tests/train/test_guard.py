"""A step that should not be learnt from is refused by all ranks alike, and what follows is exactly what was asked for:
the run that skipped it, or the run that never had its samples, bit by bit."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from megagrok.config.schema import GuardConfig
from megagrok.engine.engine import Engine
from megagrok.engine.optimizer import shards
from megagrok.errors import EXIT_BUG, EXIT_TRANSIENT
from megagrok.train.files import RunFiles
from megagrok.train.guard import Guard
from tests.train.commands import assert_same_bits, lines, run, tensors
from tests.train.injected import EXPERTS, SPIKES, Inject, spike_once, spoil, train_injected, train_plainly

STEPS = 8
LAYOUTS = {
    "experts": EXPERTS,
    "stages": ("parallel.pipeline=2",),
    "tensor": ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
    "no ZeRO": (*EXPERTS, "parallel.zero=0"),
    "bf16": (*EXPERTS, "train.precision=bf16"),
}
SLOW = ("stages", "tensor", "no ZeRO", "bf16")
# What strikes which step, on which rank: one element of one gradient.
STRIKES = {2: (1, float("nan")), 5: (0, float("inf")), 7: (1, 1e30)}


def strike(step: int, engine: Engine) -> None:
    if step in STRIKES and torch.distributed.get_rank() == STRIKES[step][0]:
        spoil(engine, STRIKES[step][1])


def die(step: int, engine: Engine) -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def assert_state(files: RunFiles, expected: dict[str, torch.Tensor]) -> None:
    assert_same_bits(tensors(files, STEPS), expected)


def training_losses(files: RunFiles) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(files) if line["kind"] == "step"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_steps_with_a_gradient_that_is_not_finite_are_skipped_by_all(config: Path, tmp_path: Path, name: str) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    settings = (*LAYOUTS[name], "guard.on_nonfinite=skip")

    def strike_and_die(step: int, engine: Engine) -> None:
        strike(step, engine)
        if step == 6:
            die(step, engine)

    # A restart has to know that fewer updates than steps were made.
    train_injected(strike_and_die, config, *settings, folder=tmp_path, status=EXIT_TRANSIENT)
    train_injected(strike, config, *settings, folder=tmp_path)
    losses, state = train_plainly(config, *LAYOUTS[name], skipped=STRIKES)
    assert_state(files, state)
    assert {step: loss for step, loss in training_losses(files).items() if step not in STRIKES} == losses
    guards = [line for line in lines(files) if line["kind"] == "guard"]
    assert {(line["step"], line["decision"], line["next_step"]) for line in guards} == {
        (step, "skip", step + 1) for step in STRIKES
    }
    done = run("audit-data", "runs/law", folder=tmp_path)
    assert "samples skipped by a guard             8" in done.out  # 2 + 2 + 4
    page = json.loads(files.bad_step(7).read_text())
    assert page["decision"] == "skip" and "not finite" in page["reason"] and page["generation"] == 2
    assert sorted(sample for rank in page["ranks"][:: len(page["ranks"])] for sample in rank["sample_ids"]) == sorted(
        page["ranks"][0]["sample_ids"]
    )
    assert all(rank["document_ids"] for rank in page["ranks"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "experts" else name for name in LAYOUTS]
)
def test_a_run_that_went_back_is_the_run_that_never_had_those_samples(config: Path, tmp_path: Path, name: str) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    train_injected(spike_once(5), config, *LAYOUTS[name], *SPIKES, folder=tmp_path)
    page = json.loads(files.bad_step(5).read_text())
    assert page["left_out"] == [[8, 10]] and page["next_step"] == 4
    assert page["grad_norm"] > page["window_mean"] + 6 * page["window_std"]
    losses, state = train_plainly(config, *LAYOUTS[name], left_out=[(8, 10)])
    assert_state(files, state)
    assert training_losses(files) == losses
    done = run("audit-data", "runs/law", folder=tmp_path)
    assert "used exactly once, in order" in done.out
    rows = dict(line.strip().rsplit(maxsplit=1) for line in done.out.splitlines() if line.startswith("  "))
    assert (rows["steps redone"], rows["samples skipped by a guard"]) == ("1", "2")


@pytest.mark.slow
def test_a_run_that_is_killed_on_its_way_back_leaves_the_same_samples_out(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")

    train_injected(spike_once(5, then=die), config, *EXPERTS, *SPIKES, folder=tmp_path, status=EXIT_TRANSIENT)
    run("train", config, *EXPERTS, *SPIKES, folder=tmp_path)
    losses, state = train_plainly(config, *EXPERTS, left_out=[(8, 10)])
    assert_state(files, state)
    assert training_losses(files) == losses
    assert "used exactly once, in order" in run("audit-data", "runs/law", folder=tmp_path).out
    # What comes next does not need the page any more: it is in the checkpoint.
    files.bad_step(5).unlink()
    assert "used exactly once, in order" in run("audit-data", "runs/law", folder=tmp_path).out


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")

    def inject(step: int, engine: Engine) -> None:
        if step >= 3:
            spoil(engine, float("nan"))

    settings = (*EXPERTS, "guard.on_nonfinite=skip", "guard.max_in_a_row=2")
    done = train_injected(inject, config, *settings, folder=tmp_path, status=EXIT_BUG)
    assert "NonFiniteError: step 5 is not learnt from" in done.err
    assert "bad step 3 without a good one between" in done.err
    assert sorted(path.name for path in files.bad_step(1).parent.iterdir()) == ["3.json", "4.json", "5.json"]
    done = run("audit-data", "runs/law", folder=tmp_path)
    assert "steps                                  4" in done.out


def test_a_step_is_skipped_before_there_is_a_checkpoint_and_ends_the_run_when_it_stays_bad(
    config: Path, tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    settings = (*EXPERTS, "guard.on_nonfinite=rewind", "checkpoint.every_steps=4")
    done = train_injected(strike, config, *settings, folder=tmp_path, status=EXIT_BUG)
    guards = [line for line in lines(files) if line["kind"] == "guard"]
    assert [(line["step"], line["decision"], line["next_step"]) for line in guards] == [
        (2, "skip", 3),
        *[(5, "rewind", 5)] * 3,  # with other samples each time
        (5, "stop", 5),
    ]
    assert "NonFiniteError: step 5 is not learnt from: the gradient is not finite" in done.err
    assert "bad step 4 without a good one between (guard.max_in_a_row)" in done.err
    page = json.loads(files.bad_step(5).read_text())
    assert page["decision"] == "stop" and page["left_out"] == [[8, 10], [10, 14], [14, 18]]
    assert "steps                                  4" in run("audit-data", "runs/law", folder=tmp_path).out


def test_a_weight_that_is_not_finite_is_never_saved(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")

    def inject(step: int, engine: Engine) -> None:
        if step == 3 and torch.distributed.get_rank() == 1:
            held = shards(engine._deepspeed, engine.local_parameters)
            held[0].moments["exp_avg_sq"][0] = float("inf")

    done = train_injected(inject, config, *EXPERTS, folder=tmp_path, status=EXIT_BUG)
    assert "is not finite and is not saved: exp_avg_sq/" in done.err and "on rank 1" in done.err
    assert [path.name for path in sorted(files.checkpoints.glob("step-*"))] == ["step-00000002"]


def flip(step_of_fault: int, rank: int, kind: str) -> Inject:
    """Turn one bit of one weight on one rank, in one step."""

    def inject(step: int, engine: Engine) -> None:
        if step == step_of_fault and torch.distributed.get_rank() == rank:
            item = next(item for item in engine.local_parameters if kind in item.parts[0].name)
            with torch.no_grad():
                item.parameter.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)

    return inject


@pytest.mark.parametrize(
    ("zero", "every", "kind", "layout", "blamed"),
    [
        pytest.param(1, 1, "q_proj", ("parallel.data=2", "parallel.expert=2"), "ranks [0], [1] (no", id="ZeRO 1"),
        pytest.param(0, 2, "experts", ("parallel.data=3", "train.micro_batch=1"), "rank 1 (2 other", id="ZeRO 0"),
        pytest.param(
            1,
            1,
            "pre_attn_norm",
            ("parallel.tensor=2", "parallel.sequence=true", "parallel.data=2"),
            "rank 1 (3 other ranks agree)",
            id="over tensor ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_bit_that_turned_in_one_copy_is_found_and_never_saved(
    config: Path, tmp_path: Path, zero: int, every: int, kind: str, layout: tuple[str, ...], blamed: str
) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    settings = (
        *layout,
        f"parallel.zero={zero}",
        f"guard.replica_check_every_steps={every}",
        "train.global_batch=12",
        "train.batch_ramp=[]",
        "train.evaluate_samples=12",
    )
    done = train_injected(flip(3, 1, kind), config, *settings, folder=tmp_path, status=EXIT_TRANSIENT)
    found = 3 if every == 1 else 4
    assert f"ReplicaError: copies of the same tensor differ at step {found}: " in done.err
    assert f"{kind}" in done.err and blamed in done.err, done.err
    assert [path.name for path in sorted(files.checkpoints.glob("step-*"))] == ["step-00000002"]


# The guard alone.


def guard(**settings: object) -> Guard:
    return Guard(GuardConfig(on_spike="skip", window_steps=8, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_steps_within_the_noise_are_no_spikes_and_far_ones_are(seed: int) -> None:
    random_ = random.Random(seed)
    watched = guard(spike_sigmas=6.0)
    for step in range(1, 300):
        loss, norm = random_.gauss(4.0, 0.1), random_.gauss(1.0, 0.05)
        verdict = watched.judge(step, loss, norm)
        # Six sigmas of eight samples' spread: a window may by chance be narrow.
        if verdict is None:
            watched.accept(step, loss, norm)
    assert watched.judge(300, 10.0, 1.0) is not None
    verdict = watched.judge(301, 4.0, 9.0)
    assert verdict is not None and verdict.is_spike and verdict.reason.startswith("the gradient norm is 9, ")


def test_nothing_is_a_spike_before_a_quarter_of_the_window_is_there_and_drops_never_are() -> None:
    watched = guard()
    assert watched.judge(1, 100.0, 100.0) is None
    watched.accept(1, 4.0, 1.0)
    assert watched.judge(2, 100.0, 100.0) is None
    watched.accept(2, 4.1, 1.1)
    assert watched.judge(3, 1.0, 0.1) is None
    assert watched.judge(3, 100.0, 1.0) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(value: float) -> None:
    for loss, norm in ((value, 1.0), (1.0, value)):
        verdict = guard().judge(1, loss, norm)
        assert verdict is not None and not verdict.is_spike and verdict.decision == "stop"


def test_a_guard_that_was_saved_decides_as_the_one_that_went_on() -> None:
    random_ = random.Random(0)
    watched = guard()
    for step in range(1, 20):
        watched.accept(step, random_.random(), random_.random())
    resumed = guard()
    resumed.load_state(json.loads(json.dumps(watched.state_dict())))
    for value in (0.5, 0.9, 1.2, 2.0, 3.0):
        assert (watched.judge(20, value, 0.5) is None) == (resumed.judge(20, value, 0.5) is None)
    assert watched.state_dict() == resumed.state_dict()
