"""The picture of `megagrok scale`: step, MFU, ETTR and tokens a day over GPUs, as SVG. Same numbers, same bytes.

Matplotlib takes half a second to import and brings numpy, which `plan` does without: only `draw` imports it.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megagrok.plan.scale import Kind, Rung, Works

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

    from megagrok.plan.scale_report import Scaling

_COLORS: Mapping[Kind, str] = {"strong": "#4c8dff", "weak": "#e8842a"}
_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megagrok",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_PANELS: tuple[tuple[str, Callable[[Works], float], bool], ...] = (
    ("seconds a step", lambda works: works.estimate.seconds.total, True),
    ("MFU, %", lambda works: 100 * works.estimate.mfu, False),
    ("ETTR, % (dashed: saving as set)", lambda works: 100 * works.interval.ettr, False),
    ("tokens a day that count (dotted: in proportion to GPUs)", lambda works: works.tokens_per_day, True),
)
"""Title, value, and whether its axis is logarithmic."""


def draw(scaling: "Scaling") -> bytes:
    """An SVG file. Sizes that cannot run have no point; a cross marks a batch beyond what is known to be of use."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        for axes, (title, value, is_log) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
            for kind, rungs in scaling.rungs.items():
                _curve(axes, kind, rungs, value)
            if title.startswith("ETTR"):
                _as_set(axes, scaling.rungs)
            if title.startswith("tokens"):
                _proportional(axes, scaling.rungs)
            axes.set_xscale("log", base=2)
            if is_log:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, None)
            axes.set_title(title)
            sizes = [rung.gpus for rungs in scaling.rungs.values() for rung in rungs]
            axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
            axes.set_xticks(ticks := sorted(set(sizes))[:: 2 if len(set(sizes)) > 8 else 1], [f"{n:,}" for n in ticks])
            axes.tick_params(axis="x", labelrotation=45)
        if any(rung.works for rungs in scaling.rungs.values() for rung in rungs):
            figure.axes[0].legend()
        figure.supxlabel(
            f"{scaling.machine.gpu.name} GPUs, {scaling.run.name}, estimates; crosses: batches beyond any that helped",
            fontsize=9,
        )
        file = io.BytesIO()
        # Without a date, or no two files would be the same.
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _curve(axes: "Axes", kind: Kind, rungs: Sequence[Rung], value: Callable[[Works], float]) -> None:
    points = [(rung.gpus, value(rung.works), rung.works) for rung in rungs if rung.works]
    if points:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", ms=3, color=_COLORS[kind], label=kind)
    beyond = [(x, y) for x, y, works in points if works.is_beyond_known_batches]
    if beyond:
        axes.plot(*zip(*beyond, strict=True), "x", ms=7, color=_COLORS[kind])


def _as_set(axes: "Axes", all_rungs: Mapping[Kind, Sequence[Rung]]) -> None:
    for kind, rungs in all_rungs.items():
        points = [(rung.gpus, 100 * rung.works.ettr_as_set) for rung in rungs if rung.works]
        if points:
            axes.plot(*zip(*points, strict=True), "--", lw=1, color=_COLORS[kind])


def _proportional(axes: "Axes", all_rungs: Mapping[Kind, Sequence[Rung]]) -> None:
    for kind, rungs in all_rungs.items():
        points = [(rung.gpus, rung.works.tokens_per_day) for rung in rungs if rung.works]
        if points:
            (first, tokens), (last, _) = points[0], points[-1]
            axes.plot([first, last], [tokens, tokens * last / first], ":", lw=1, color=_COLORS[kind])
