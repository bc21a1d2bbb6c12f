"""The pictures of a run's report, as SVG text that stands in an HTML page. What is plotted, not where it is put.

One idea: a picture has no background and its ink is the page's own text colour, so one picture reads on a light and
on a dark page. Matplotlib cannot write `currentColor`; a colour that nothing else uses stands in and is replaced.

Long runs are averaged into bins before they are drawn: the page stays small however many steps there were.
Importing matplotlib takes half a second, so only `megagrok.telemetry.report` imports this file, when it writes.
"""

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from megagrok.telemetry.expert_load import imbalance
from megagrok.telemetry.records import EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK = "#0a0b0c"
"""Stands for the page's text colour."""
BLUE, ORANGE, GREEN = "#4c8dff", "#e8842a", "#2fa36b"
"""Middle tones, readable on white and on near-black."""
MAX_POINTS = 800
"""Points of a line; more steps are averaged into this many."""
MAX_COLUMNS = 160
"""Columns of a heat map over steps."""
MAX_LAYERS = 6
"""Layers whose experts are drawn over the steps: the first, the last and some between."""
LOAD_COLORS = ListedColormap(mpl.colormaps["RdBu_r"](numpy.linspace(0.15, 0.85, 256)))
"""Blue below an even share, red above; without the darkest ends, on which black numbers could not be read."""
MAX_PRINTED_CELLS = 200
"""A larger heat map has colours only, no numbers."""
STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "svg.hashsalt": "megagrok",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.xmargin": 0.01,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

Value = Callable[[StepRecord], float]


def draw_loss(records: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord]) -> str:
    """Training loss of each step and held-out loss of each evaluation."""
    with mpl.rc_context(STYLE):
        figure = _figure(height=3.6)
        axes = figure.subplots()
        if records:
            axes.plot(*_line(records, lambda record: record.loss), color=BLUE, linewidth=1.3, label="training")
        if evaluations:
            steps = [evaluation.step for evaluation in evaluations]
            losses = [_plottable(evaluation.loss) for evaluation in evaluations]
            axes.plot(steps, losses, color=ORANGE, linewidth=1.6, marker="o", markersize=4, label="held out")
        axes.set_title("Loss, nats per token")
        axes.set_xlabel("step")
        axes.legend()
        return _svg(figure)


def draw_panels(records: Sequence[StepRecord]) -> str:
    """Learning rate, gradient norm, throughput, and MFU or, where that is not known, the time of a step."""
    panels: list[tuple[str, str, Value]] = [
        ("Learning rate", BLUE, lambda record: record.lr),
        ("Gradient norm before clipping", ORANGE, lambda record: record.grad_norm),
        ("Tokens per second", GREEN, lambda record: record.tokens_per_second),
    ]
    if all(record.mfu is None for record in records):
        panels.append(("Seconds per step", GREEN, lambda record: record.step_seconds))
    else:
        panels.append(("MFU, % of peak", GREEN, lambda record: math.nan if record.mfu is None else 100 * record.mfu))
    with mpl.rc_context(STYLE):
        figure = _figure(height=4.6)
        for axes, (title, color, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            axes.plot(*_line(records, value), color=color, linewidth=1.2)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
        return _svg(figure)


def draw_final_load(records: Sequence[StepRecord]) -> str:
    """Heat map of layers x experts at the end: mean load of the last tenth of the records; 1 is an even share."""
    load_LE = _mean_load(records[-max(1, len(records) // 10) :])
    num_layers, num_experts = len(load_LE), len(load_LE[0])
    with mpl.rc_context(STYLE):
        figure = _figure(height=min(9.0, 1.4 + 0.26 * num_layers))
        axes = figure.subplots()
        image = _heat_map(axes, load_LE, highest=max(map(max, load_LE)))
        axes.set_title("Expert load at the end (1 = even share)")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        if num_layers * num_experts <= MAX_PRINTED_CELLS:
            for layer, row in enumerate(load_LE):
                for expert, load in enumerate(row):
                    axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7.5, color="black")
        figure.colorbar(image, ax=axes, pad=0.01)
        return _svg(figure)


def draw_load_over_steps(records: Sequence[StepRecord]) -> str:
    """Experts over steps for up to MAX_LAYERS layers; below them, the imbalance of all layers."""
    columns = [_mean_load(part) for part in _bins(records, MAX_COLUMNS)]
    layers = _spread(len(columns[0]), MAX_LAYERS)
    highest = max(max(column[layer]) for column in columns for layer in layers)
    # A heat map's columns are cells; half a cell on either side puts their middles on the steps.
    half = (records[-1].step - records[0].step) / max(1, len(columns) - 1) / 2 or 0.5
    span = (records[0].step - half, records[-1].step + half)
    with mpl.rc_context(STYLE):
        figure = _figure(height=1.15 * (len(layers) + 1) + 0.8)
        grid = figure.subplots(len(layers) + 1, 1, sharex=True)
        for axes, layer in zip(grid, layers, strict=False):
            load_ES = [list(row) for row in zip(*(column[layer] for column in columns), strict=True)]
            image = _heat_map(axes, load_ES, highest=highest, span=span)
            axes.set_title(f"Layer {layer}: load of each expert (1 = even share)")
            axes.set_ylabel("expert")
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        figure.colorbar(image, ax=list(grid), pad=0.01, aspect=50)
        below = grid[-1]
        below.plot(*_line(records, _worst_imbalance), color=ORANGE, linewidth=1.2, label="worst layer")
        below.plot(*_line(records, _mean_imbalance), color=BLUE, linewidth=1.2, label="mean of layers")
        below.set_title("Largest over mean load (1 = even)")
        below.set_xlabel("step")
        below.legend(ncols=2, fontsize=8)
        return _svg(figure)


def _figure(*, height: float) -> Figure:
    # Figure, not pyplot: pyplot would pick a window system and keep every figure alive.
    return Figure(figsize=(9.0, height), layout="constrained")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # What stands before <svg> is the XML declaration, which has no place inside a page.
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _heat_map(
    axes: Axes, rows: list[list[float]], *, highest: float, span: tuple[float, float] | None = None
) -> AxesImage:
    """An image of load over an even share: blue below 1, red above. span: the x range; None counts columns from 0."""
    left, right = span if span is not None else (-0.5, len(rows[0]) - 0.5)
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="none",
        cmap=LOAD_COLORS,
        norm=TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, highest)),
        extent=(left, right, len(rows) - 0.5, -0.5),
    )
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def _line(records: Sequence[StepRecord], value: Value) -> tuple[list[float], list[float]]:
    """Steps and values, averaged into at most MAX_POINTS bins; what is not finite leaves a gap."""
    bins = _bins(records, MAX_POINTS)
    steps = [sum(record.step for record in part) / len(part) for part in bins]
    return steps, [_plottable(sum(value(record) for record in part) / len(part)) for part in bins]


def _plottable(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _bins(records: Sequence[StepRecord], limit: int) -> list[Sequence[StepRecord]]:
    """The records in order, in at most `limit` parts whose sizes differ by at most one."""
    count = min(limit, len(records))
    edges = [index * len(records) // count for index in range(count + 1)]
    return [records[start:end] for start, end in pairwise(edges)]


def _mean_load(records: Sequence[StepRecord]) -> list[list[float]]:
    """[L, E] mean over the records of share * E: 1 is an even share."""
    by_layer = zip(*(record.expert_load for record in records), strict=True)
    return [[sum(shares) / len(records) * len(layer[0]) for shares in zip(*layer, strict=True)] for layer in by_layer]


def _spread(count: int, limit: int) -> list[int]:
    """Up to `limit` indices below `count`, evenly spaced, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]


def _worst_imbalance(record: StepRecord) -> float:
    return max(imbalance(record.expert_load))


def _mean_imbalance(record: StepRecord) -> float:
    loads = imbalance(record.expert_load)
    return sum(loads) / len(loads)
