"""The report of a run: one HTML file that needs nothing else, readable in ten years and in an e-mail.

One idea: everything it says comes from the records and the facts that it is given; it measures nothing and opens no
other file. Pictures are SVG inside the page (`figures`), text is escaped, there is no script and nothing is loaded.
"""

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagrok.telemetry.expert_load import imbalance
from megagrok.telemetry.progress import format_duration
from megagrok.telemetry.records import EvaluationRecord, StepRecord
from megagrok.whole_file import write_whole

STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --muted: #626a76;
        --page: #f6f7f9; --card: #ffffff; --line: #d9dde3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --muted: #9aa3b0; --page: #12151a; --card: #1b2027; --line: #313842; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.lead { color: var(--muted); margin: .2rem 0 1.4rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .7rem; }
.numbers div, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.numbers div { padding: .7rem .9rem; } .numbers b { display: block; font-size: 1.3rem; font-weight: 600; }
.numbers span { color: var(--muted); font-size: .82rem; }
.card { padding: .9rem; margin-bottom: .9rem; overflow-x: auto; }
.card svg { width: 100%; height: auto; display: block; }
.card svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .32rem .6rem; text-align: left; vertical-align: top; }
tr + tr > * { border-top: 1px solid var(--line); } th { font-weight: 500; color: var(--muted); white-space: nowrap; }
td { overflow-wrap: anywhere; } td, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .86rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(
    path: Path,
    *,
    records: Sequence[StepRecord],
    evaluations: Sequence[EvaluationRecord],
    facts: Mapping[str, str],
    sample: str,
) -> None:
    """Write the page; a page that stood there is replaced whole.

    records, evaluations: in the order of the steps, each may be empty.  facts: what else the table shows, in order:
    settings, device, paths, the command that resumes; "run" among them gives the title.  sample: text that the model
    wrote, "" for none.  Takes one to three seconds, most of it matplotlib. Raises OSError if it cannot be written.
    """
    title = facts.get("run", path.resolve().parent.name)
    sections = [
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(_summary(records))}</p>',
        _numbers(_final_numbers(records, evaluations)),
        *_pictures(records, evaluations),
    ]
    if sample:
        sections.append(f'<h2>Text the model wrote</h2><div class="card"><pre>{html.escape(sample)}</pre></div>')
    sections.append(f'<h2>The run</h2><div class="card">{_table(facts)}</div>')
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} - megagrok</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    write_whole(path, page)


def _summary(records: Sequence[StepRecord]) -> str:
    if not records:
        return "A megagrok run that has not recorded a step."
    seconds = sum(record.step_seconds for record in records)
    tokens = sum(record.tokens for record in records)
    return (
        f"A megagrok run: steps {records[0].step:,} to {records[-1].step:,}; the {len(records):,} recorded ones "
        f"trained on {tokens:,} tokens in {format_duration(seconds)} of step time."
    )


def _final_numbers(records: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord]) -> dict[str, str]:
    numbers: dict[str, str] = {}
    if evaluations:
        numbers["held-out loss"] = f"{evaluations[-1].loss:.4f}"
        numbers["perplexity"] = f"{evaluations[-1].perplexity:,.2f}"
    if records:
        numbers["training loss, last step"] = f"{records[-1].loss:.4f}"
        # The median, because the first step compiles and a checkpoint may slow another.
        numbers["tokens/s, median"] = f"{statistics.median(record.tokens_per_second for record in records):,.0f}"
        numbers["seconds/step, median"] = f"{statistics.median(record.step_seconds for record in records):.3g}"
        known_mfu = [record.mfu for record in records if record.mfu is not None]
        if known_mfu:
            numbers["MFU, median"] = f"{100 * statistics.median(known_mfu):.2f} %"
        clipped = sum(record.clip_coefficient < 1.0 for record in records)
        numbers["steps clipped"] = f"{100 * clipped / len(records):.0f} %"
        if records[-1].expert_load:
            numbers["worst expert imbalance, last step"] = f"{max(imbalance(records[-1].expert_load)):.2f}"
    return numbers


def _pictures(records: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord]) -> list[str]:
    # Here and not above: matplotlib takes half a second to import, and only this function needs it.
    from megagrok.telemetry import figures

    sections = []
    if records or evaluations:
        sections.append(_section("Loss", figures.draw_loss(records, evaluations)))
    if records:
        sections.append(_section("Optimization and speed", figures.draw_panels(records)))
    if records and records[-1].expert_load:
        sections.append(
            _section("Experts", figures.draw_final_load(records), figures.draw_load_over_steps(records)),
        )
    return sections


def _section(heading: str, *pictures: str) -> str:
    return f"<h2>{heading}</h2>" + "".join(f'<div class="card">{picture}</div>' for picture in pictures)


def _numbers(numbers: Mapping[str, str]) -> str:
    cells = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in numbers.items()
    )
    return f'<div class="numbers">{cells}</div>'


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{cells}</table>"
