"""What a drill found, for people (Markdown) and for programs (JSON): seed, machine, versions, and every round."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megagrok import __version__
from megagrok.drill.campaign import Request, Trial

_LIBRARIES = ("torch", "megatron-core", "deepspeed")


def line(trial: Trial) -> str:
    """One trial in one line, as it ends."""
    if trial.skipped is not None:
        return f"{trial.fault:<10} not run: {trial.skipped}"
    verdict = "as untouched" if not trial.problems else f"{len(trial.problems)} PROBLEM(S): {trial.problems[0]}"
    return (
        f"{trial.fault:<10} {len(trial.rounds):>3} rounds, {trial.num_lives:>3} starts, {trial.wall_seconds:6.1f} s, "
        f"{_percentiles(trial)}: {verdict}"
    )


def to_markdown(request: Request, trials: Sequence[Trial]) -> str:
    """The page of a drill."""
    rows = [
        f"| {trial.fault} | {len(trial.rounds)} | {trial.num_lives} | {_seconds(trial, 'end_seconds')} | "
        f"{_seconds(trial, 'recovery_seconds')} | {_redone(trial)} | {trial.effective_time_ratio:.2f} | "
        f"{_verdict(trial)} |"
        for trial in trials
    ]
    lines = [
        "# A drill",
        "",
        f"`megagrok drill {' '.join(request.faults)} --rounds {request.rounds} --seed {request.seed}`, "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC.",
        "",
        *(f"- {name}: {value}" for name, value in facts().items()),
        "",
        "Each fault has a run of its own, of the same model and seed as one that nobody touched. The verdict is the "
        "oracle's (O1 losses, O2 state, O3 samples, O4 progress, O5 exit, O6 remains: megagrok/drill/oracle.py). "
        "Seconds are from the fault to the end of the start that it hit, and to the first step beyond those made "
        "before it (for slow: to its being named); p50 / p99. ETTR is the time that the steps take when nothing "
        "happens, over all of the time.",
        "",
        "| fault | rounds | starts | ended after, s | recovered after, s | steps redone, most / all | ETTR | verdict |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    for trial in trials:
        if trial.problems:
            lines += [f"## {trial.fault}", "", *(f"- {problem}" for problem in trial.problems), ""]
    return "\n".join(lines)


def to_json(request: Request, trials: Sequence[Trial]) -> str:
    """Everything, round by round."""
    asked = {"faults": list(request.faults), "rounds": request.rounds, "seed": request.seed}
    whole = {"asked": asked, "machine": facts(), "trials": [asdict(trial) for trial in trials]}
    return json.dumps(whole, indent=1) + "\n"


def facts() -> dict[str, str]:
    """The machine and the versions."""
    return {
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"megagrok {__version__}", f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in _LIBRARIES]
        ),
    }


def _verdict(trial: Trial) -> str:
    if trial.skipped is not None:
        return f"not run: {trial.skipped}"
    return "as untouched" if not trial.problems else f"{len(trial.problems)} problems"


def _percentiles(trial: Trial) -> str:
    return f"recovered in {_seconds(trial, 'recovery_seconds')} s"


def _seconds(trial: Trial, field: str) -> str:
    values = [value for each in trial.rounds if (value := asdict(each)[field]) is not None]
    if not values:
        return "-"
    return f"{np.percentile(values, 50):.1f} / {np.percentile(values, 99):.1f}"


def _redone(trial: Trial) -> str:
    redone = [each.steps_redone for each in trial.rounds]
    return f"{max(redone, default=0)} / {sum(redone)}"


def _processor() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        return platform.processor() or "unknown processor"
    return platform.processor() or "unknown processor"
