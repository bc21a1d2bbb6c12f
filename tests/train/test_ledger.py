"""Real runs that are killed and go on in other layouts prove by their ledger that no sample came twice or never."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from megagrok.data.ledger import Begin, ledger_path, read_ledger
from megagrok.errors import EXIT_TRANSIENT, CheckpointError, DataError
from megagrok.train.files import RunFiles
from tests.train.commands import Command, run, steps_in, wait_until

STEPS = 8
TWO_DATA_RANKS = ("parallel.data=2", "parallel.expert=2")
TWO_STAGES = ("parallel.pipeline=2",)
NO_RAMPS = ("schedule.warmup_steps=0", "schedule.decay_steps=0")


def kill_after(step: int, config: Path, folder: Path, *settings: str) -> None:
    command = Command("train", config, *settings, folder=folder)
    files = RunFiles(folder / "runs" / "law")
    wait_until(lambda: step in steps_in(files), command)
    os.kill(command.ranks()[-1], signal.SIGKILL)
    assert command.wait().status == EXIT_TRANSIENT


@pytest.fixture(scope="module")
def restless(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed on two data ranks inside the batch ramp, then on one; finished on two."""
    folder = tmp_path_factory.mktemp("restless")
    kill_after(3, config, folder, *TWO_DATA_RANKS)
    kill_after(5, config, folder, "parallel.zero=0")
    run("train", config, *TWO_DATA_RANKS, folder=folder)
    return folder


@pytest.mark.fault("F30")
def test_a_run_that_was_killed_and_moved_used_each_sample_once(restless: Path) -> None:
    done = run("audit-data", "runs/law", folder=restless)
    assert "Every sample of 0..22 was used exactly once, in order." in done.out  # five steps of 2, three of 4
    rows = dict(line.strip().rsplit(maxsplit=1) for line in done.out.splitlines() if line.startswith("  "))
    assert rows["steps"] == "8" and rows["samples"] == "22"
    assert int(rows["steps redone"]) >= 1


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda lines: lines[:2] + lines[3:], "has no line: samples 3"),
        (lambda lines: lines[:3] + lines[2:], "has 2 lines"),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"[[3,", b"[[2,"), *lines[3:]],
            "is not the line that was written",
        ),
        (lambda lines: [line.replace(b'"data_rank":1', b'"data_rank":0') for line in lines], "not the line that was"),
    ],
    ids=["removed", "doubled", "edited", "passed off as another rank's"],
)
def test_a_line_that_was_tampered_with_is_named(restless: Path, tmp_path: Path, tamper: object, words: str) -> None:
    shutil.copytree(restless / "runs", tmp_path / "runs")
    path = ledger_path(RunFiles(tmp_path / "runs" / "law").ledger, 1)
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))  # type: ignore[operator]
    done = run("audit-data", "runs/law", folder=tmp_path, status=DataError.exit_code)
    assert words in done.out and "exactly once" not in done.out, done.out


def test_files_of_two_ranks_that_were_swapped_are_named(restless: Path, tmp_path: Path) -> None:
    shutil.copytree(restless / "runs", tmp_path / "runs")
    first, second = (ledger_path(RunFiles(tmp_path / "runs" / "law").ledger, rank) for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    done = run("audit-data", "runs/law", folder=tmp_path, status=DataError.exit_code)
    assert "data-00000.jsonl:1 is a line of data rank 1" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("parts", [3, 1], ids=["inside an epoch", "at its edge"])
def test_a_run_goes_on_in_another_layout_inside_an_epoch_and_at_its_edge(
    config: Path, tmp_path: Path, parts: int
) -> None:
    text = config.read_text().replace("200_000", "20_000").replace("until_samples: 9", "until_samples: 1")
    small = tmp_path / "small.yaml"
    small.write_text(text.replace("seq_len: 16", "seq_len: 64").replace("fraction: 0.1", "fraction: 0.3"))
    ledger = ledger_path(RunFiles(tmp_path / "runs" / "law").ledger, 0)
    run("train", small, *NO_RAMPS, "train.steps=1", folder=tmp_path)
    begin = next(read_ledger(ledger))
    assert isinstance(begin, Begin)
    shutil.rmtree(tmp_path / "runs")
    # The ramp's one step, then steps of an epoch or of a third of one.
    batch = (begin.samples_per_epoch - 2) // parts
    settings = (
        small,
        *NO_RAMPS,
        f"train.global_batch={batch}",
        "train.evaluate_every_steps=100",
        "checkpoint.every_steps=1",
    )
    run("train", *settings, "train.steps=2", folder=tmp_path)
    run("train", *settings, "train.steps=4", *TWO_STAGES, folder=tmp_path)
    restart = [line for line in read_ledger(ledger) if isinstance(line, Begin)][-1]
    assert (restart.consumed_samples == begin.samples_per_epoch) == (parts == 1)
    done = run("audit-data", "runs/law", folder=tmp_path)
    assert f"Every sample of 0..{2 + 3 * batch:,} was used exactly once, in order" in done.out


def grow(folder: Path, number: int) -> None:
    """A corpus of `number` documents, the later ones in other words."""
    folder.mkdir(exist_ok=True)
    for document in range(number):
        words = "the quick brown fox jumps. " if document < 40 else "sphinx of black quartz, judge my vow! "
        (folder / f"{document:03d}.txt").write_text(f"document {document}: " + words * 60)


def grow_back(folder: Path, number: int) -> None:
    """Only the first `number` documents."""
    for path in sorted(folder.iterdir())[number:]:
        path.unlink()


def test_other_data_are_refused_with_what_changed_and_accepted_on_the_record_only(config: Path, tmp_path: Path) -> None:
    grow(tmp_path / "corpus", 40)
    text = config.read_text().replace("- kind: python_stdlib", "- kind: text\n      path: corpus")
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("held_out_fraction: 0.1", "held_out_fraction: 0.2"))
    run("train", own, "train.steps=4", folder=tmp_path)
    grow(tmp_path / "corpus", 60)
    # More text trains another tokenizer, which the weights do not know.
    refused = run("train", own, "--accept-data-change", folder=tmp_path, status=DataError.exit_code)
    assert "the tokenizer changed" in refused.err and "data.tokenizer=RUN/tokenizer.json" in refused.err
    kept = ("data.tokenizer=runs/law/tokenizer.json", "data.tokenizer_vocab_size=null")
    refused = run("train", own, *kept, folder=tmp_path, status=CheckpointError.exit_code)
    assert "data.tokenizer: the checkpoint has None" in refused.err and "--accept-data-change" in refused.err
    run("train", own, "--accept-data-change", *kept, "train.steps=6", folder=tmp_path)
    grow(tmp_path / "corpus", 80)
    refused = run("resume", "runs/law", folder=tmp_path, status=DataError.exit_code)
    assert "the data changed under the run" in refused.err
    assert "training documents, now" in refused.err and "--accept-data-change" in refused.err
    grow_back(tmp_path / "corpus", 60)
    run("resume", "runs/law", "train.steps=8", folder=tmp_path)  # from here on these are the run's data
    done = run("audit-data", "runs/law", folder=tmp_path)
    assert "note: after step 4 (generation " in done.out and "exactly once" in done.out
