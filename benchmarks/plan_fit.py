"""Fit the time model's constants to published runs, and predict runs of sources that the fit has not seen.

Least squares of the logarithm of predicted over published speed, robust, each source weighted by its runs to the power
of -0.4, and each constant pulled back to the value that a source gives. Runs with a tag take no part.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published_runs import PublishedRun
from megagrok.plan.constants import Constants
from megagrok.plan.step_time import step_seconds

ERROR = 0.08
"""Relative error at which a run begins to count as far off."""
SPREAD = 1.2
"""Factor by which a source's value may be wrong; WIDER names those that are known less well."""
WIDER = {"launch": 1.3, "hop": 4.0, "step": 1.6, "network_fall": 2.0, "cast_fp8": 2.0, "moved": 1.6,
         "matmul_traffic": 1.6, "update": 1.4, "matmul_bf16": 1.1}  # fmt: skip
START: dict[str, tuple[float, float, float]] = {
    # What the fit starts from (constants.py says whence), and what physics and data sheets leave room for.
    "matmul_bf16": (0.72, 0.5, 0.85),
    "matmul_fp8": (0.60, 0.4, 0.75),
    "matmul_traffic": (1.0, 0.5, 4.0),
    "expert_matmul": (0.85, 0.5, 1.0),
    "attention": (0.45, 0.25, 0.7),
    "older_attention": (0.31, 0.2, 0.5),
    "memory": (0.80, 0.5, 0.95),
    "moved": (1.0, 0.7, 3.0),
    "eager": (2.5, 1.0, 5.0),
    "cast_fp8": (3.0, 0.5, 10.0),
    "launch": (19e-6, 4e-6, 40e-6),
    "launch_fp8": (1.5, 1.0, 3.0),
    "graphed": (0.5, 0.1, 0.9),
    "nvlink": (0.65, 0.3, 0.9),
    "network": (0.65, 0.2, 0.95),
    "network_fall": (0.02, 0.001, 0.3),
    "rails": (0.8, 0.2, 1.0),
    "exchange": (0.8, 0.2, 1.0),
    "nvlink_latency": (8e-6, 2e-6, 40e-6),
    "network_latency": (20e-6, 5e-6, 100e-6),
    "hop": (100e-6, 20e-6, 3e-3),
    "tensor_hidden": (0.5, 0.05, 0.95),
    "expert_hidden": (0.6, 0.05, 0.95),
    "data_hidden": (0.7, 0.05, 0.98),
    "straggler": (0.01, 0.001, 0.05),
    "natural": (0.25, 0.05, 0.6),
    "update": (40.0, 20.0, 90.0),
    "step": (0.02, 0.005, 0.2),
}


def predict(run: PublishedRun, constants: Constants) -> float:
    """Tokens per second and GPU."""
    seconds = step_seconds(run.shape, run.layout, run.machine, run.habits, constants).total
    return run.layout.tokens / run.layout.world_size / seconds


def fit(runs: Sequence[PublishedRun]) -> Constants:
    """The constants that these runs ask for. The same runs give the same constants."""
    sources = [run.source for run in runs]
    weights = np.array([sources.count(source) ** -0.4 for source in sources]) / ERROR
    start, low, high = (np.log([bounds[i] for bounds in START.values()]) for i in range(3))
    pull = np.log([WIDER.get(name, SPREAD) for name in START])

    def constants(logs: np.ndarray) -> Constants:
        return replace(Constants(), **dict(zip(START, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        trial = constants(logs)
        errors = weights * [math.log(predict(run, trial) / run.tokens_per_second) for run in runs]
        robust = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1))
        return np.concatenate([robust, (logs - start) / pull])

    return constants(least_squares(residuals, start, bounds=(low, high), diff_step=1e-3, max_nfev=30).x)


def leave_one_source_out(runs: Sequence[PublishedRun]) -> dict[int, float]:
    """Line of each run -> its speed as predicted by constants fitted to the untagged runs of the other sources."""
    predicted = {}
    for source in dict.fromkeys(run.source for run in runs):
        constants = fit([run for run in runs if run.source != source and not run.tag])
        predicted |= {run.line: predict(run, constants) for run in runs if run.source == source}
    return predicted
