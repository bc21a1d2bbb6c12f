"""Laws of the progress display, on a real pseudo-terminal and on a file."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Callable
from contextlib import suppress

import pytest

from megagrok.telemetry.progress import Progress, format_duration
from megagrok.telemetry.records import StepRecord, make_evaluation

MakeStep = Callable[..., StepRecord]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_a_plain_line_every_ten_seconds_and_at_evaluations(make_step: MakeStep) -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, 0, stream, clock)
    for step in range(1, 1001):
        clock.now += 0.5
        progress.step(make_step(step))
        if step == 30:
            progress.evaluation(make_evaluation(step=step, loss=4.0, tokens=10))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step +(\d+)/1000", line)[1]) for line in lines] == [  # type: ignore[index]
        1,
        21,
        30,
        *range(41, 1000, 20),
        1000,
    ]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "step    1/1000  loss 5.0000  2,048 tokens/s  MFU 25.0%  lr 1.00e-03  ETA ?"
    assert lines[2] == "step   30/1000  held-out loss 4.0000  perplexity 54.60"
    # 500 s for 1000 steps: after 501 of them, 499 x 0.5 s are left.
    assert next(line for line in lines if line.startswith("step  501/")).endswith("ETA 4m10s")


def test_the_last_step_is_always_shown_and_an_unknown_mfu_never(make_step: MakeStep) -> None:
    stream = io.StringIO()
    progress = Progress(12, 10, stream, Clock())
    progress.step(make_step(11, mfu=None))
    progress.step(make_step(12, mfu=None))
    progress.close()
    assert [line[:10] for line in stream.getvalue().splitlines()] == ["step 11/12", "step 12/12"]
    assert "MFU" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_starts_at_the_resumed_step(make_step: MakeStep) -> None:
    reader, writer = pty.openpty()
    # A fresh pseudo-terminal is 0 columns wide.
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(writer, "w") as stream:
        progress = Progress(100, 40, stream)
        for step in range(41, 101):
            progress.step(make_step(step))
            if step == 50:
                progress.evaluation(make_evaluation(step=step, loss=4.0, tokens=10))
        progress.close()
    shown = b""
    try:
        while part := os.read(reader, 65536):
            shown += part
    except OSError:
        pass  # Linux says EIO where the other end of a terminal is closed.
    os.close(reader)
    text = shown.decode()
    frames = re.findall(r"\| (\d+/100)", text)
    assert frames[0] == "40/100"
    assert frames[-1] == "100/100"
    assert "loss 5.0000  2,048 tokens/s  MFU 25.0%" in text
    assert "ETA" in text
    assert re.search(r"step  50/100  held-out loss 4\.0000  perplexity 54\.60\r?\n", text)


def test_closing_before_the_first_step_shows_nothing_on_a_log_file() -> None:
    stream = io.StringIO()
    Progress(10, 0, stream).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (725, "12m05s"),
        (3600, "1h00m"),
        (27000, "7h30m"),
        (273600, "3d04h"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_log_on_a_full_disk_ends_nothing(make_step: MakeStep) -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115  # closing it fails too
    progress = Progress(10, 0, stream)
    for step in range(1, 11):
        progress.step(make_step(step))
    progress.say("a word")
    progress.close()
    with suppress(OSError):
        stream.close()
