"""Laws of the report: one small file, nothing loaded, nothing unescaped, whatever the run was."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from megagrok.telemetry.records import StepRecord, make_evaluation
from megagrok.telemetry.report import write_report

MakeStep = Callable[..., StepRecord]


class Page(HTMLParser):
    """The tags that were opened, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        # A picture inside an SVG is embedded (data:) or points into the page (#).
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def write(tmp_path: Path, steps: list[StepRecord], **changes: object) -> str:
    path = tmp_path / "report.html"
    evaluations = [make_evaluation(step=record.step, loss=record.loss, tokens=10) for record in steps[::5]]
    write_report(path, **{"records": steps, "evaluations": evaluations, "facts": {}, "sample": ""} | changes)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_shows_numbers_pictures_facts_and_text(tmp_path: Path, make_step: MakeStep) -> None:
    facts = {"run": "tiny", "device": "2 CPU cores", "resume with": "megagrok train tiny.yaml"}
    text = write(tmp_path, [make_step(step) for step in range(1, 21)], facts=facts, sample="Once upon a time")
    page = Page(text)
    assert page.tags.count("svg") == 4
    for shown in (
        "2 CPU cores",
        "megagrok train tiny.yaml",
        "Once upon a time",
        "25.00 %",
        "MFU, % of peak",
        "held out",
    ):
        assert shown in page.text
    assert page.text.count("Layer ") == 2


def test_the_page_loads_nothing_and_its_pictures_are_well_formed(tmp_path: Path, make_step: MakeStep) -> None:
    text = write(tmp_path, [make_step(step) for step in range(1, 21)])
    page = Page(text)
    assert "script" not in page.tags
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in page.loads)
    assert "@import" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture
        assert "#0a0b0c" not in picture


def test_text_of_the_run_cannot_become_markup(tmp_path: Path, make_step: MakeStep) -> None:
    attack = "</pre><script>alert(1)</script>&\"'"
    text = write(tmp_path, [make_step(1)], facts={"run": attack, attack: attack}, sample=attack)
    assert "script" not in Page(text).tags
    assert Page(text).text.count(attack) >= 4


def test_a_diverged_run_still_has_a_report(tmp_path: Path, make_step: MakeStep) -> None:
    losses = [5.0, 6.0, math.inf, -math.inf, math.nan]
    steps = [make_step(step, loss=loss, mfu=None) for step, loss in enumerate(losses, start=1)]
    assert "Seconds per step" in write(tmp_path, steps)


def test_a_run_without_steps_or_without_experts_has_a_report(tmp_path: Path, make_step: MakeStep) -> None:
    assert "has not recorded a step" in write(tmp_path, [])
    assert Page(write(tmp_path, [make_step(1, expert_load=())])).tags.count("svg") == 2


def test_a_layer_that_routed_nothing_is_drawn(tmp_path: Path, make_step: MakeStep) -> None:
    assert Page(write(tmp_path, [make_step(1, expert_load=((0.0, 0.0),))])).tags.count("svg") == 4


def test_a_long_run_of_a_large_model_stays_far_below_two_megabytes(tmp_path: Path, make_step: MakeStep) -> None:
    load = tuple(tuple((1 + (layer + expert) % 3) / 16 for expert in range(8)) for layer in range(64))
    text = write(tmp_path, [make_step(step, loss=5 + math.sin(step), expert_load=load) for step in range(1, 3001)])
    assert len(text) < 1_000_000
    assert "Layer 0:" in text
    assert "Layer 63:" in text


def test_the_page_does_not_grow_with_the_steps(tmp_path: Path, make_step: MakeStep) -> None:
    sizes = [
        len(write(tmp_path, [make_step(step, loss=5 + math.sin(step)) for step in range(1, count + 1)], evaluations=[]))
        for count in (1600, 6400)
    ]
    assert sizes[1] < 1.05 * sizes[0]


def test_the_same_run_gives_the_same_file(tmp_path: Path, make_step: MakeStep) -> None:
    steps = [make_step(step) for step in range(1, 11)]
    assert write(tmp_path, steps) == write(tmp_path, steps)
