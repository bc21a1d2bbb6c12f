"""The run as a person watches it: a live bar on a terminal, a plain line every ten seconds in a log file.

One idea: the stream decides which. A bar written into a CI log or a Slurm output file is thousands of carriage returns;
a line every step on a terminal scrolls the start of the run away. The bar is tqdm's.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Never, TextIO

from tqdm import tqdm

from megagrok.telemetry.records import EvaluationRecord, StepRecord

PLAIN_EVERY_SECONDS = 10.0
"""Between two plain lines; the first and the last step always have one."""


class Progress:
    """What the one rank that talks shows. `step` and `evaluation` come in order, `close` once, also after an error."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._clock = clock
        self._last_line_at: float | None = None
        self._first: tuple[int, float] | None = None
        self._bar: tqdm[Never] | None = None
        if stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}  {desc}ETA {remaining}",
            )

    def step(self, record: StepRecord) -> None:
        """Show a step."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_description_str(f"{_speed(record)}  ", refresh=False)
                self._bar.update(record.step - self._bar.n)
            return
        now = self._clock()
        if self._first is None:
            self._first = (record.step, now)
        is_due = self._last_line_at is None or now - self._last_line_at >= PLAIN_EVERY_SECONDS
        if is_due or record.step == self._total_steps:
            self._last_line_at = now
            self._print(
                f"{self._place(record.step)}  {_speed(record)}  lr {record.lr:.2e}  ETA {self._eta(record.step)}"
            )

    def evaluation(self, record: EvaluationRecord) -> None:
        """Show an evaluation, always."""
        text = f"{self._place(record.step)}  held-out loss {record.loss:.4f}  perplexity {record.perplexity:,.2f}"
        self._print(text)

    def say(self, text: str) -> None:
        """Show a line, always."""
        self._print(text)

    def close(self) -> None:
        """Leave the bar as it is and the cursor below it."""
        with suppress(OSError):
            if self._bar is not None:
                self._bar.close()

    def _print(self, text: str) -> None:
        # A terminal that is gone, or a log file on a full disk, is no reason to end a run.
        with suppress(OSError):
            if self._bar is not None:
                # Above the bar, which is drawn again below.
                self._bar.write(text, file=self._stream)
            else:
                self._stream.write(text + "\n")
                self._stream.flush()

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"

    def _eta(self, step: int) -> str:
        """By wall time since the first step seen, which itself is left out: it compiles and warms up."""
        assert self._first is not None
        first_step, first_at = self._first
        if step == first_step:
            return "?"
        seconds = (self._total_steps - step) * (self._clock() - first_at) / (step - first_step)
        return format_duration(seconds)


def format_duration(seconds: float) -> str:
    """Two units at most, as a person says it: 41s, 12m05s, 7h30m, 3d04h."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"


def _speed(record: StepRecord) -> str:
    mfu = "" if record.mfu is None else f"  MFU {100 * record.mfu:.1f}%"
    return f"loss {record.loss:.4f}  {record.tokens_per_second:,.0f} tokens/s{mfu}"
