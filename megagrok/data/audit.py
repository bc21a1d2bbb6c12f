"""Proof from a run's own ledger that every sample was used exactly once, in order, over all restarts and layouts.

Reads lines and positions, no data and no tensors; needs no torch. The one idea: which sample goes where is arithmetic
(batches.py), so each line that counts is held against the samples that its step and rank should have had. What differs
is then looked up sample by sample: duplicates and gaps, with their steps, ranks and generations.

A line counts unless a later part of the run began before it: the steps after a checkpoint that was gone back to are
abandoned, they are in no weights.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megagrok.data.ledger import (
    FILE_PATTERN,
    Action,
    Begin,
    Damage,
    DataChange,
    Run,
    Step,
    encode_samples,
    ledger_path,
    read_ledger,
)
from megagrok.errors import DataError

Part = tuple[int, int]
"""Generation, and part of it."""
_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the ledger proves, or does not."""

    problems: tuple[str, ...]
    """One line each; empty if every sample of 0 .. num_samples was used once, in order, or left out by a guard."""
    notes: tuple[str, ...]
    """What a reader should know and is no fault: data that were changed on the record, steps in no checkpoint."""
    num_steps: int
    num_samples: int
    """Position in the data after the last step."""
    num_epochs: float
    num_generations: int
    num_redone: int
    """Steps that were made again after a restart or a rewind."""
    num_skipped: int
    """Samples of steps that a guard skipped."""
    num_left_out: int
    """Samples that a guard took out of the order by a rewind."""

    def to_text(self) -> str:
        """The table and the verdict, as `megagrok audit-data` prints them."""
        rows = (
            ("steps", f"{self.num_steps:,}"),
            ("samples", f"{self.num_samples:,}"),
            ("epochs", f"{self.num_epochs:.3g}"),
            ("generations", f"{self.num_generations:,}"),
            ("steps redone", f"{self.num_redone:,}"),
            ("samples skipped by a guard", f"{self.num_skipped + self.num_left_out:,}"),
        )
        lines = [f"  {name:<28}{value:>12}" for name, value in rows]
        lines += [f"note: {note}" for note in self.notes]
        if not self.problems:
            return "\n".join([*lines, f"Every sample of 0..{self.num_samples:,} was used exactly once, in order."])
        shown = list(self.problems[:_SHOWN])
        more = len(self.problems) - len(shown)
        return "\n".join([*lines, *shown, *([f"and {more} more"] if more else [])])


@dataclass(slots=True)
class _Book:
    """All lines of all files, in the order of the parts."""

    begins: dict[Part, dict[int, Begin]] = field(default_factory=lambda: defaultdict(dict))
    steps: dict[Part, dict[int, dict[int, list[Step]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    """Part, step, data rank."""
    changes: dict[tuple[int, str, str], DataChange] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def parts(self) -> list[Part]:
        return sorted({*self.begins, *self.steps})

    def first_step(self, part: Part) -> int:
        """The last step before the part."""
        if self.begins[part]:
            return min(begin.step for begin in self.begins[part].values())
        return min(self.steps[part]) - 1


def audit(folder: Path, saved: Mapping[int, int]) -> Audit:
    """Audit the ledger of a run.

    folder: RUN/ledger.  saved: consumed samples of each checkpoint that the run has, by step. Reads every line once.
    Raises DataError if there is no ledger.
    """
    book = _read(folder)
    at, num_epochs, last_step, num_skipped = 0, 0.0, 0, 0
    problems = book.problems
    history = _history(book)
    for number, (part, steps) in enumerate(history):
        begin = next(iter(book.begins[part].values()), None)
        if begin is None:
            problems.append(f"generation {part[0]}: the line of its start is missing")
        left_out = () if begin is None else begin.left_out
        if begin is not None and steps:
            problems += _begin_problems(book.begins[part], at if last_step == begin.step else None)
        came = at
        for step in steps:
            if step > last_step + 1:
                problems.append(_missing_steps(last_step + 1, step - 1, history, number))
                at = max(at, min(_first_sample(lines) for lines in book.steps[part][step].values()))
            found, at = _check_step(part, step, book.steps[part][step], at, left_out)
            problems += found
            last_step = step
            num_skipped += sum(
                _size(line.samples)
                for lines in book.steps[part][step].values()
                for line in lines[:1]
                if line.action == "skipped"
            )
            if saved.get(step, at) != at:
                problems.append(f"step {step}: its checkpoint is at sample {saved[step]:,}, the ledger at {at:,}")
        if begin is not None and begin.samples_per_epoch:
            num_epochs += (at - came) / begin.samples_per_epoch
    newest = max(saved, default=0)
    if newest > last_step:
        problems.append(f"{_no_line(last_step + 1, newest)}: the newest checkpoint is of step {newest}")
    if problems:
        problems += _duplicates_and_gaps(book, history, at)
    begins = [begin for part, _ in history for begin in book.begins[part].values()]
    left_out_samples = {
        sample for begin in begins for low, high in begin.left_out for sample in range(low, min(high, at))
    }
    counted = {(part, step) for part, steps in history for step in steps}
    redone = {
        (part, step) for part in book.steps for step, lines in book.steps[part].items() if _is_done(lines)
    } - counted
    return Audit(
        problems=tuple(problems),
        notes=tuple(_notes(book, last_step, newest)),
        num_steps=last_step,
        num_samples=at,
        num_epochs=num_epochs,
        num_generations=len({generation for generation, _ in book.parts()}),
        num_redone=len(redone),
        num_skipped=num_skipped,
        num_left_out=len(left_out_samples),
    )


def actions(folder: Path) -> dict[int, Action]:
    """What became of each step that counts, by the ledger; damaged lines are passed over, see `audit`.

    Raises DataError if there is no ledger.
    """
    book = _read(folder)
    return {
        step: next(iter(book.steps[part][step].values()))[0].action for part, steps in _history(book) for step in steps
    }


def _read(folder: Path) -> _Book:
    paths = sorted(folder.glob(FILE_PATTERN))
    if not paths:
        raise DataError(f"{folder} has no ledger: the run has not begun, or was made before there were ledgers")
    book = _Book()
    for path in paths:
        for number, line in enumerate(read_ledger(path), start=1):
            if isinstance(line, Damage):
                book.problems.append(f"{line.place} {line.problem}")
            elif ledger_path(folder, line.data_rank) != path:
                book.problems.append(f"{path.name}:{number} is a line of data rank {line.data_rank}")
            elif isinstance(line, Begin):
                book.begins[line.generation, line.part][line.data_rank] = line
            elif isinstance(line, DataChange):
                book.changes[line.step, line.before, line.after] = line
            else:
                book.steps[line.generation, line.part][line.step][line.data_rank].append(line)
    return book


def _is_done(lines: Mapping[int, Sequence[Step]]) -> bool:
    return any(line.action in ("trained", "skipped") for rank in lines.values() for line in rank)


def _history(book: _Book) -> list[tuple[Part, list[int]]]:
    """The parts in their order, each with the steps that count: done, and before every later part's begin."""
    history: list[tuple[Part, list[int]]] = []
    bound: float = float("inf")
    for part in reversed(book.parts()):
        steps = sorted(step for step, lines in book.steps[part].items() if step <= bound and _is_done(lines))
        history.append((part, steps))
        bound = min(bound, book.first_step(part))
    return history[::-1]


def _begin_problems(begins: Mapping[int, Begin], at: int | None) -> list[str]:
    """at: the position that the ledger has come to, where it has come to the step of the begin."""
    problems = []
    first = next(iter(begins.values()))
    for rank, begin in begins.items():
        where = f"generation {begin.generation}, data rank {rank}"
        if begin.step != first.step or begin.left_out != first.left_out:
            problems.append(f"{where} begins at step {begin.step}, data rank {first.data_rank} at step {first.step}")
        if at is not None and begin.consumed_samples != at:
            problems.append(f"{where} begins at sample {begin.consumed_samples:,}, the steps before it end at {at:,}")
    return problems


def _missing_steps(first: int, last: int, history: Sequence[tuple[Part, list[int]]], number: int) -> str:
    before = [generation for (generation, _), steps in history[:number] if steps]
    of = f"generation {history[number][0][0]}" if not before else f"generation {before[-1]} or {history[number][0][0]}"
    return f"{_no_line(first, last)} ({of})"


def _no_line(first: int, last: int) -> str:
    return f"step {first} has no line" if first == last else f"steps {first} to {last} have no line"


def _check_step(
    part: Part, step: int, by_rank: Mapping[int, Sequence[Step]], at: int, left_out: Sequence[tuple[int, int]]
) -> tuple[list[str], int]:
    """What is wrong with the lines of a step that counts, and the position after it."""
    first = next(iter(by_rank.values()))[0]
    place = f"step {step}, generation {part[0]}"
    problems = []
    shape = (first.data_size, first.micro_batch, first.global_batch)
    for rank, lines in sorted(by_rank.items()):
        if len(lines) > 1:
            problems.append(f"{place}: data rank {rank} has {len(lines)} lines")
        if (lines[0].data_size, lines[0].micro_batch, lines[0].global_batch) != shape or rank >= first.data_size:
            problems.append(f"{place}: data ranks {first.data_rank} and {rank} differ in layout or batch")
        if lines[0].action != first.action:
            says = f"data rank {first.data_rank} says {first.action}, data rank {rank} {lines[0].action}"
            problems.append(f"{place}: {says}")
    if problems:
        return problems, max(at, max(map(_end, by_rank.values())))
    expected, after = expected_samples(at, *shape, left_out)
    for rank in range(first.data_size):
        if rank not in by_rank:
            problems.append(f"{place}: data rank {rank} of {first.data_size} has no line: {_named(expected[rank])}")
        elif by_rank[rank][0].samples != expected[rank]:
            seen = by_rank[rank][0].samples
            problems.append(f"{place}: data rank {rank} had {_named(seen)}, expected {_named(expected[rank])}")
    return problems, after


def expected_samples(
    at: int, data_size: int, micro_batch: int, global_batch: int, left_out: Sequence[tuple[int, int]]
) -> tuple[list[tuple[Run, ...]], int]:
    """The samples of each data rank in the step at position `at`, encoded, and the position after it."""
    width = data_size * micro_batch
    if not width or global_batch % width:
        return [() for _ in range(data_size)], at
    if not any(low < at + global_batch and at < high for low, high in left_out):
        if data_size == 1:
            return [((at, 1, global_batch, global_batch),)], at + global_batch
        count = global_batch // width
        stride = width if count > 1 else micro_batch
        return [
            ((at + rank * micro_batch, count, stride, micro_batch),) for rank in range(data_size)
        ], at + global_batch
    positions = take(at, global_batch, left_out)
    ranks = [
        encode_samples(
            [
                positions[start + offset]
                for start in range(rank * micro_batch, global_batch, width)
                for offset in range(micro_batch)
            ]
        )
        for rank in range(data_size)
    ]
    return ranks, positions[-1] + 1


def take(at: int, count: int, left_out: Sequence[tuple[int, int]]) -> list[int]:
    """The next `count` samples at or after `at` that are not left out."""
    taken: list[int] = []
    while len(taken) < count:
        beyond = next((high for low, high in left_out if low <= at < high), at)
        if beyond > at:
            at = beyond
        else:
            taken.append(at)
            at += 1
    return taken


def _duplicates_and_gaps(book: _Book, history: Sequence[tuple[Part, list[int]]], until: int) -> list[str]:
    """Every sample below `until` that was not used exactly once, joined to ranges."""
    users: dict[int, list[str]] = defaultdict(list)
    left_out: set[int] = set()
    for part, steps in history:
        for begin in book.begins[part].values():
            left_out.update(sample for low, high in begin.left_out for sample in range(low, min(high, until)))
        for step in steps:
            for rank, lines in book.steps[part][step].items():
                for line in lines:
                    if _size(line.samples) <= line.global_batch:
                        for sample in line.sample_ids():
                            users[sample].append(f"step {step}, data rank {rank}, generation {part[0]}")
    named: dict[str, list[int]] = defaultdict(list)
    for sample in range(until):
        if len(users[sample]) > 1:
            named[f"used {len(users[sample])} times: {'; '.join(users[sample])}"].append(sample)
        elif not users[sample] and sample not in left_out:
            named["a gap: no line that counts has them"].append(sample)
    return [f"{_named(encode_samples(samples))}: {what}" for what, samples in named.items()]


def _notes(book: _Book, last_step: int, newest: int) -> Iterable[str]:
    for change in book.changes.values():
        yield (
            f"after step {change.step} (generation {change.generation}) the data were changed on the record: "
            f"{change.before[:8]} -> {change.after[:8]}; the same numbers are other samples from there on"
        )
    if last_step > newest:
        yield f"steps {newest + 1} to {last_step} are in no checkpoint: a restart makes them again"


def _named(samples: Sequence[Run]) -> str:
    texts = []
    for first, count, stride, length in samples[:4]:
        text = f"{first:,}" if length == 1 else f"{first:,}..{first + length - 1:,}"
        texts.append(
            text if count == 1 else f"{text} and every {stride:,} after it to {first + (count - 1) * stride:,}"
        )
    return "samples " + ", ".join(texts) + (", ..." if len(samples) > 4 else "")


def _size(samples: Sequence[Run]) -> int:
    return sum(count * length for _, count, _, length in samples)


def _first_sample(lines: Sequence[Step]) -> int:
    return min((run[0] for line in lines for run in line.samples), default=0)


def _end(lines: Sequence[Step]) -> int:
    return max(
        (first + (count - 1) * stride + length for line in lines for first, count, stride, length in line.samples),
        default=0,
    )
