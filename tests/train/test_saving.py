"""A save that fails costs itself: the run goes on, says so, and ends only when too many have failed in a row."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megagrok.checkpoint import AsyncSaver, Fragment, list_steps
from megagrok.checkpoint.disk import Disk, Space
from megagrok.config import RunConfig, decode_config
from megagrok.errors import MachineError
from megagrok.parallel.beats import Beats
from megagrok.parallel.ranks import Alone, Ranks
from megagrok.plan import total_params
from megagrok.slurm.checks import measure
from megagrok.train import room
from megagrok.train.attempt import read_attempts
from megagrok.train.files import RunFiles
from megagrok.train.room import require_room
from megagrok.train.saving import Save
from megagrok.train.trainer import StepResult
from tests.checkpoint.worlds import Meeting, StoppingDisk, ThreadRanks, find, read_all, run_world, small_file_system
from tests.train.commands import lines, run, tensors
from tests.train.conftest import CONFIGS, Untouched


class Weights:
    """An engine as a save sees it; its one weight is the number of the step."""

    def __init__(self, rank: int) -> None:
        self.value, self._rank = torch.zeros(100), rank

    def state_fragments(self) -> Iterator[Fragment]:
        yield Fragment(f"x{self._rank}", (100,), (0,), (100,), 0, 100, self.value)


class Flaky(StoppingDisk):
    """A disk whose saves fail as a script says: "x" fails, anything else succeeds, and so do those after its end."""

    def __init__(self, script: str, code: int = errno.EIO) -> None:
        super().__init__(None, code)
        self._script = list(script)

    def create(self, path: Path) -> int:
        if path.name.endswith(".safetensors") and self._script and self._script.pop(0) == "x":
            self._stop(path)
        return super().create(path)


def tiny(*settings: str) -> RunConfig:
    return decode_config(
        CONFIGS / "run" / "tiny.yaml", ["checkpoint.every_steps=2", "train.steps=12", *settings]
    ).config


def result(step: int) -> StepResult:
    """A step as `Save` sees it: it looks at the number alone."""
    return StepResult(step, None, None, 0.0, 1, step, 0.0)  # type: ignore[arg-type]


def train(root: Path, scripts: list[str]) -> tuple[list[tuple[list[int], int | str]], list[str]]:
    """Twelve steps on as many ranks as there are scripts: for each rank the steps it made and the newest step saved, or
    the error that ended it; and what rank 0 said."""
    said: list[str] = []
    beats = Beats(0, len(scripts))

    def work(ranks: Ranks) -> tuple[list[int], int | str]:
        engine, made = Weights(ranks.rank), []
        # The law is about threads of one process: the groups of the run and of its writer are two meetings.
        saver = AsyncSaver(root, ranks=writers[ranks.rank], keep=9, disk=Flaky(scripts[ranks.rank]))
        say = said.append if ranks.rank == 0 else lambda text: None
        save = Save(tiny(), saver, engine, lambda: {"run_id": "law"}, ranks, beats.pulse(ranks.rank), say, None)  # type: ignore[arg-type]
        try:
            for step in range(1, 13):
                engine.value.fill_(step)
                made.append(step)
                save.after_step(result(step))
            save.ensure(12)
        except MachineError as error:
            assert error.exit_code == 5
            return made, str(error)
        return made, beats.read()[ranks.rank].saved or 0

    meeting = Meeting(len(scripts))
    writers = [ThreadRanks(rank, meeting) if len(scripts) > 1 else Alone() for rank in range(len(scripts))]
    outcomes = run_world(len(scripts), work)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes, said  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("script", "saved"),
    [
        ("......", [12, 10, 8, 6, 4, 2]),
        ("x.....", [12, 10, 8, 6, 4]),
        ("xx.xx.", [12, 6]),
        (".x.x.x", [12, 10, 6, 2]),
        ("....xxx", None),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_goes_on_until_three_saves_in_a_row_have_failed(
    tmp_path: Path, script: str, saved: list[int] | None, num_ranks: int
) -> None:
    outcomes, said = train(tmp_path, ["", script][-num_ranks:])
    failed = [line for line in said if "NOT saved" in line]
    if saved is None:
        # Saves of steps 10 and 12 fail, and the end of the run tries once more.
        assert [made for made, _ in outcomes] == [list(range(1, 13))] * num_ranks
        assert len({text for _, text in outcomes}) == 1
        assert "3 saves in a row failed" in str(outcomes[0][1]) and "The newest is of step 8" in str(outcomes[0][1])
        assert "Input/output error" in str(outcomes[0][1]) and list_steps(tmp_path) == [8, 6, 4, 2]
        return
    assert outcomes == [(list(range(1, 13)), 12)] * num_ranks
    assert list_steps(tmp_path) == saved and len(failed) == script.count("x")
    assert all("Input/output error" in line and "Training goes on" in line for line in failed)
    assert [line.split(":")[0] for line in said if "NOT" not in line] == [f"step {step} saved" for step in saved[::-1]]
    for step in saved:
        assert all(
            torch.equal(x, torch.full((100,), float(step))) for x in read_all(find(tmp_path, step=step)).values()
        )


def test_three_failures_end_the_run_at_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    outcomes, said = train(tmp_path, [".x", "..xx", "...."])
    assert len({str(outcome) for outcome in outcomes}) == 1
    made, text = outcomes[0]
    assert 8 <= len(made) < 12 and "The newest is of step 2." in str(text)
    assert len([line for line in said if "NOT saved" in line]) == 2 and list_steps(tmp_path) == [2]


def test_the_end_of_a_run_waits_for_its_last_save_and_tries_again(tmp_path: Path) -> None:
    outcomes, said = train(tmp_path, [".....xx"])
    assert outcomes == [(list(range(1, 13)), 12)] and list_steps(tmp_path) == [12, 10, 8, 6, 4, 2]
    assert [line.split(":")[0] for line in said[-3:]] == ["step 12 was NOT saved"] * 2 + ["step 12 saved"]


def test_a_run_that_went_back_saves_its_steps_again(tmp_path: Path) -> None:
    engine = Weights(0)
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=9)
    pulse = Beats(0, 1).pulse(0)
    save = Save(tiny(), saver, engine, lambda: {"run_id": "law"}, Alone(), pulse, lambda text: None, None)  # type: ignore[arg-type]
    for value, steps in ((1.0, (1, 2, 3, 4)), (2.0, (3, 4))):
        engine.value.fill_(value)
        for step in steps:
            save.after_step(result(step))
        save.ensure(4)
    assert torch.equal(read_all(find(tmp_path, step=4))["x0"], torch.full((100,), 2.0))
    assert torch.equal(read_all(find(tmp_path, step=2))["x0"], torch.full((100,), 1.0))


def test_what_a_run_saved_before_it_went_back_is_not_what_it_ends_with(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=9, disk=Flaky("..xxx"))
    pulse = Beats(0, 1).pulse(0)
    save = Save(tiny(), saver, Weights(0), lambda: {"run_id": "law"}, Alone(), pulse, lambda text: None, None)  # type: ignore[arg-type]
    for step in (1, 2, 3, 4, 3, 4):
        save.after_step(result(step))
    with pytest.raises(MachineError, match="3 saves in a row failed"):
        save.ensure(4)


def test_nothing_is_exchanged_in_steps_without_a_write(tmp_path: Path) -> None:
    class Counting(Alone):
        calls = 0

        def any(self, flag: bool) -> bool:
            Counting.calls += 1
            return flag

    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=9)
    pulse = Beats(0, 1).pulse(0)
    save = Save(tiny(), saver, Weights(0), lambda: {"run_id": "law"}, Counting(), pulse, lambda text: None, None)  # type: ignore[arg-type]
    save.after_step(result(1))
    assert Counting.calls == 0
    save.after_step(result(2))
    while not saver.has_outcome:
        pass
    save.after_step(result(3))
    assert Counting.calls == 1 and not saver.is_writing
    save.after_step(result(5))
    assert Counting.calls == 1


def test_a_run_that_fills_its_disk_ends_after_three_saves_with_what_it_had(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    files.root.mkdir(parents=True)
    one = 12 * total_params(decode_config(config, []).config.model)
    with small_file_system(files.checkpoints, f"{int(2.5 * one) >> 10}k") as mounted:
        if not mounted:
            pytest.skip("needs root and mount(8) for a small tmpfs")
        done = run("train", config, "checkpoint.every_steps=1", folder=tmp_path, status=5)
        assert done.err.count("was NOT saved: checkpoint step") == 2
        assert "MachineError: 3 saves in a row failed, the last with: " in done.err
        assert f"No space left on {files.checkpoints.relative_to(tmp_path)}: needs " in done.err
        assert "The newest is of step 2." in done.err and list_steps(files.checkpoints) == [2, 1]
        assert tensors(files, 2) and not list(files.checkpoints.glob("*.tmp"))
        # It trained on while saves failed.
        assert max(line["step"] for line in lines(files) if line["kind"] == "step") >= 5


def test_a_disk_with_room_for_less_than_two_checkpoints_is_refused_before_a_step(config: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "runs" / "law")
    files.root.mkdir(parents=True)
    with small_file_system(files.checkpoints, "64k") as mounted:
        if not mounted:
            pytest.skip("needs root and mount(8) for a small tmpfs")
        done = run("train", config, folder=tmp_path, status=5)
        assert "MachineError: No space left on runs/law/checkpoints: needs " in done.err
        assert "2 more checkpoints of" in done.err and not files.metrics.exists()


@pytest.mark.parametrize(("there", "count"), [(0, 2), (1, 1), (2, 1), (9, 1)])
def test_room_is_asked_for_what_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, count: int
) -> None:
    for step in range(there):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "COMMIT.json").touch()
    needed = count * 12 * total_params(tiny().model)

    class Measured(Disk):
        left = needed

        def free_space(self, path: Path) -> Space:
            return Space(self.left, -1)

    monkeypatch.setattr(room, "Disk", Measured)
    require_room(tiny(), tmp_path)
    Measured.left = needed - 1
    with pytest.raises(MachineError, match=rf"No space left on .*{count} more checkpoint"):
        require_room(tiny(), tmp_path)


def test_a_pulse_says_that_it_saves_while_the_run_is_held(tmp_path: Path) -> None:
    beats = Beats(0, 1)
    seen: list[tuple[str, int]] = []

    class Watched(Weights):
        def state_fragments(self) -> Iterator[Fragment]:
            seen.append((beats.read()[0].phase, beats.read()[0].step))
            yield from super().state_fragments()

    pulse = beats.pulse(0)
    pulse.enter("step", 2)
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=2)
    save = Save(tiny(), saver, Watched(0), lambda: {"run_id": "law"}, Alone(), pulse, lambda text: None, None)  # type: ignore[arg-type]
    save.after_step(result(2))
    assert seen == [("save", 2)] and beats.read()[0].phase == "step" and beats.read()[0].saved is None
    save.ensure(2)
    assert beats.read()[0].saved == 2 and np.isfinite(beats.read()[0].at)


def test_the_page_of_a_start_has_the_slowest_of_the_saves_that_its_log_tells_of(untouched: Untouched) -> None:
    (attempt,) = read_attempts(untouched.files.root)
    said = untouched.done.out + untouched.done.err
    told = [float(a) + float(b) for a, b in re.findall(r"saved: held ([\d.]+) s, written in ([\d.]+) s", said)]
    assert len(told) > 1
    # The log rounds both to hundredths.  Another rank's copy may have taken longer than rank 0's.
    assert attempt.slowest_save_seconds is not None and attempt.slowest_save_seconds >= max(told) - 0.011
    assert attempt.slowest_save_seconds < max(told) + 1.0
    assert measure(untouched.files).save == attempt.slowest_save_seconds


def test_a_checkpoint_that_was_found_is_no_save_that_took_time() -> None:
    beats = Beats(0, 2)
    beats.pulse(0).saved(4)
    assert [beat.slowest_save_seconds for beat in beats.read()] == [0.0, 0.0]
    for seconds in (1.5, 3.0, 2.0):
        beats.pulse(1).saved(8, seconds)
    assert [(beat.saved, beat.slowest_save_seconds) for beat in beats.read()] == [(4, 0.0), (8, 3.0)]
