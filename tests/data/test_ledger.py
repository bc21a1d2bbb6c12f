"""Laws of the ledger and its audit, on ledgers written by the real writer: what was tampered with is named."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagrok.data.audit import Audit, audit, expected_samples
from megagrok.data.ledger import (
    Action,
    Begin,
    DataChange,
    Ledger,
    Step,
    decode_line,
    decode_samples,
    digest_documents,
    encode_line,
    encode_samples,
    ledger_path,
    next_part,
)
from megagrok.errors import DataError


class Writer:
    """Writes what a run's data ranks would: the same arithmetic as batches.py, done the long way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.at, self.complaints = folder, 0, list[str]()
        self.generation, self.part, self.data_size, self.micro_batch = 0, 0, 1, 1
        self.left_out: tuple[tuple[int, int], ...] = ()

    def ledger(self, rank: int) -> Ledger:
        return Ledger(ledger_path(self.folder, rank), self.complaints.append)

    def start(self, step: int, at: int, data_size: int, micro_batch: int = 1) -> None:
        self.generation, self.part = self.generation + 1, 0
        self.data_size, self.micro_batch = data_size, micro_batch
        self.begin(step, at)

    def rewind(self, step: int, at: int, left_out: tuple[int, int]) -> None:
        self.part, self.left_out = self.part + 1, (*self.left_out, left_out)
        self.begin(step, at)

    def begin(self, step: int, at: int) -> None:
        self.at = at
        for rank in range(self.data_size):
            ledger = self.ledger(rank)
            ledger.write(
                Begin(
                    generation=self.generation,
                    part=self.part,
                    data_rank=rank,
                    data_size=self.data_size,
                    step=step,
                    consumed_samples=at,
                    samples_per_epoch=10,
                    fingerprint="f",
                    left_out=self.left_out,
                )
            )
            ledger.close()

    def step(self, step: int, global_batch: int, action: Action = "trained") -> None:
        positions = [
            sample
            for sample in range(self.at, self.at + global_batch + 100)
            if not any(low <= sample < high for low, high in self.left_out)
        ][:global_batch]
        self.at = positions[-1] + 1
        for rank in range(self.data_size):
            mine = [
                sample for number, sample in enumerate(positions) if number // self.micro_batch % self.data_size == rank
            ]
            ledger = self.ledger(rank)
            ledger.write(
                Step(
                    generation=self.generation,
                    part=self.part,
                    data_rank=rank,
                    data_size=self.data_size,
                    micro_batch=self.micro_batch,
                    global_batch=global_batch,
                    step=step,
                    samples=encode_samples(mine),
                    documents="d",
                    action=action,
                )
            )
            ledger.close()


@pytest.fixture
def eventful(tmp_path: Path) -> Writer:
    """Three starts, two layouts, a ramp, a skipped step, a rewind: 8 steps, 38 samples."""
    writer = Writer(tmp_path / "ledger")
    writer.start(0, 0, data_size=2)
    for step in range(1, 6):
        writer.step(step, 4)
    writer.start(3, 12, data_size=1, micro_batch=2)  # it was killed after step 5, and step 3 was the newest saved
    writer.step(4, 4)
    writer.step(5, 6, "skipped")
    writer.start(5, 22, data_size=2, micro_batch=2)
    writer.step(6, 4)
    writer.step(7, 4, "rewound")
    writer.rewind(5, 22, (26, 30))
    for step in range(6, 9):
        writer.step(step, 4)
    return writer


SAVED = {3: 12, 5: 22, 8: 38}


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_run_with_everything_in_it_is_proven_to_have_used_each_sample_once(eventful: Writer) -> None:
    found = audit(eventful.folder, SAVED)
    assert found == Audit(
        problems=(),
        notes=(),
        num_steps=8,
        num_samples=38,
        num_epochs=pytest.approx(3.8),
        num_generations=3,
        num_redone=3,  # steps 4 and 5 of the first start, step 6 before the rewind
        num_skipped=6,
        num_left_out=4,
    )
    assert found.to_text().endswith("Every sample of 0..38 was used exactly once, in order.")


def edit(line: bytes, **changes: object) -> bytes:
    """A line that says something else and has the right CRC all the same."""
    decoded = decode_line(line.rstrip(b"\n"))
    return encode_line(replace(decoded, **changes))  # type: ignore[arg-type]


def remove_step_2(files: list[Path]) -> None:
    lines = lines_of(files[1])
    files[1].write_bytes(b"".join(lines[:2] + lines[3:]))


def double_step_2(files: list[Path]) -> None:
    lines = lines_of(files[1])
    files[1].write_bytes(b"".join(lines[:3] + lines[2:]))


def turn_a_bit(files: list[Path]) -> None:
    content = bytearray(files[0].read_bytes())
    content[content.index(b'"samples":[[4') + 12] ^= 1
    files[0].write_bytes(content)


def forge_samples(files: list[Path]) -> None:
    lines = lines_of(files[0])
    files[0].write_bytes(b"".join([*lines[:2], edit(lines[2], samples=((6, 2, 2, 1),)), *lines[3:]]))


def forge_action(files: list[Path]) -> None:
    lines = lines_of(files[1])
    files[1].write_bytes(b"".join([*lines[:3], edit(lines[3], action="skipped"), *lines[4:]]))


def swap_files(files: list[Path]) -> None:
    first, second = (path.read_bytes() for path in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def lose_a_file(files: list[Path]) -> None:
    files[1].unlink()


def lose_a_start(files: list[Path]) -> None:
    for path in files:
        kept = [line for line in lines_of(path) if not (b'"begin"' in line and b'"generation":3,"part":1' in line)]
        path.write_bytes(b"".join(kept))


def cut_the_end(files: list[Path]) -> None:
    for path in files:
        path.write_bytes(path.read_bytes()[:-10])


def lose_a_step(files: list[Path]) -> None:
    for path in files:
        kept = [line for line in lines_of(path) if not (b'"generation":2' in line and b'"step":4' in line)]
        path.write_bytes(b"".join(kept))


TAMPERINGS: dict[str, tuple[Callable[[list[Path]], None], list[str]]] = {
    "a line removed": (
        remove_step_2,
        ["step 2, generation 1: data rank 1 of 2 has no line: samples 5 and every 2 after it to 7", "a gap"],
    ),
    "a line doubled": (
        double_step_2,
        ["step 2, generation 1: data rank 1 has 2 lines", "used 2 times: step 2, data rank 1, generation 1"],
    ),
    "a bit turned": (turn_a_bit, ["data-00000.jsonl:3 is not the line that was written", "step 2, generation 1"]),
    "samples forged": (
        forge_samples,
        [
            "step 2, generation 1: data rank 0 had samples 6 and every 2 after it to 8, expected samples 4",
            "samples 4: a gap",
            "samples 8: used 2 times: step 2, data rank 0, generation 1; step 3, data rank 0, generation 1",
        ],
    ),
    "an action forged": (forge_action, ["step 3, generation 1: data rank 0 says trained, data rank 1 skipped"]),
    "files swapped": (swap_files, ["data-00000.jsonl:1 is a line of data rank 1"]),
    "a file lost": (lose_a_file, ["step 1, generation 1: data rank 1 of 2 has no line"]),
    "a rewind's begin lost": (lose_a_start, ["generation 3: the line of its start is missing"]),
    "the end cut": (cut_the_end, ["step 8 has no line"]),
    "a step lost": (lose_a_step, ["step 4 has no line (generation 1 or 2)", "samples 12..15: a gap"]),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_was_tampered_with_is_named(eventful: Writer, name: str) -> None:
    tamper, expected = TAMPERINGS[name]
    tamper([ledger_path(eventful.folder, rank) for rank in range(2)])
    found = audit(eventful.folder, SAVED)
    assert found.problems
    text = "\n".join(found.problems)
    for words in expected:
        assert words in text, text
    assert "exactly once" not in found.to_text()


def test_a_checkpoint_at_another_position_is_named(eventful: Writer) -> None:
    assert audit(eventful.folder, {5: 20}).problems[0] == "step 5: its checkpoint is at sample 20, the ledger at 22"
    assert audit(eventful.folder, {9: 42}).problems[0] == "step 9 has no line: the newest checkpoint is of step 9"


def test_steps_beyond_the_newest_checkpoint_are_noted(eventful: Writer) -> None:
    assert audit(eventful.folder, {5: 22}).notes == ("steps 6 to 8 are in no checkpoint: a restart makes them again",)


def test_a_change_of_the_data_is_told_and_is_no_fault(eventful: Writer) -> None:
    change = DataChange(generation=3, part=1, data_rank=0, step=8, before="a" * 32, after="b" * 32)
    eventful.ledger(0).write(change)
    (note,) = audit(eventful.folder, SAVED).notes
    assert "after step 8 (generation 3) the data were changed on the record: aaaaaaaa -> bbbbbbbb" in note


def test_no_ledger_is_an_error_and_not_a_proof(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no ledger"):
        audit(tmp_path, {})


@pytest.mark.parametrize("seed", range(5))
def test_samples_come_back_as_they_were_whatever_they_are(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(500):
        ids = [random_.randrange(12) for _ in range(random_.randrange(14))]
        assert decode_samples(encode_samples(ids)) == tuple(ids)
    assert encode_samples(range(100, 200)) == ((100, 1, 100, 100),)
    assert encode_samples([*range(0, 2), *range(8, 10), *range(16, 18)]) == ((0, 3, 8, 2),)


@pytest.mark.parametrize("left_out", [(), ((3, 5),), ((0, 4), (6, 7), (7, 9))])
@pytest.mark.parametrize(("data_size", "micro_batch"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_the_ranks_samples_make_up_the_step_and_nothing_else(
    data_size: int, micro_batch: int, left_out: tuple[tuple[int, int], ...]
) -> None:
    at, used = 0, list[int]()
    for _ in range(4):
        ranks, at = expected_samples(at, data_size, micro_batch, 2 * data_size * micro_batch, left_out)
        used += sorted(sample for runs in ranks for sample in decode_samples(runs))
    missing = {sample for low, high in left_out for sample in range(low, high)}
    assert used == [sample for sample in range(at) if sample not in missing]


def test_a_torn_line_goes_when_the_file_is_opened_again_and_costs_no_other(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(0, 0, data_size=1)
    writer.step(1, 2)
    path = ledger_path(tmp_path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"step","gener')
    assert audit(tmp_path, {1: 2}).problems == ()
    writer.step(2, 2)
    assert path.read_bytes().startswith(whole + b'{"kind":"step","generation":1')
    assert audit(tmp_path, {2: 4}).problems == ()


def test_a_disk_that_refuses_is_said_once_and_the_audit_names_what_it_cost(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "ledger")
    writer.start(0, 0, data_size=1)
    ledger = writer.ledger(0)
    path = ledger_path(writer.folder, 0)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")  # and no link is followed
    step = Step(
        generation=1, part=0, data_rank=0, data_size=1, micro_batch=1, global_batch=2, step=1,
        samples=((0, 1, 2, 2),), documents=digest_documents([[1], [2]]), action="trained",
    )  # fmt: skip
    ledger.write(step)
    ledger.write(replace(step, step=2, samples=((2, 1, 2, 2),)))
    ledger.sync()
    assert len(writer.complaints) == 1 and "cannot be written" in writer.complaints[0]
    path.unlink()
    (tmp_path / "kept").rename(path)
    ledger.write(replace(step, step=3, samples=((4, 1, 2, 2),)))
    ledger.close()
    found = audit(writer.folder, {3: 6})
    assert found.problems[0] == "steps 1 to 2 have no line (generation 1)"


def test_a_start_with_the_number_of_an_earlier_one_is_a_part_of_its_own(tmp_path: Path) -> None:
    assert next_part(tmp_path, 0, 1) == 0
    writer = Writer(tmp_path)
    writer.start(0, 0, data_size=1)
    assert (next_part(tmp_path, 0, 1), next_part(tmp_path, 0, 2)) == (1, 0)


@pytest.mark.parametrize(
    "line", [b"", b"{}", b'{"kind":"step","crc":1}', encode_line(DataChange(
        generation=1, part=0, data_rank=0, step=1, before="a", after="b"))[:-1].replace(b'"a"', b'"c"')]
)  # fmt: skip
def test_a_line_that_was_not_written_here_is_refused(line: bytes) -> None:
    with pytest.raises(DataError):
        decode_line(line)


def test_the_audit_needs_no_torch() -> None:
    code = "import sys, megagrok.data.audit; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
