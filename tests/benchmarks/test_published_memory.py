"""The memory of published runs: nanotron's 57 within 8 %, whose sizes are of weights, gradients and optimizer; peaks of
Megatron-Bridge within 10 %, or with bf16 moments where its recipe keeps them so."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from benchmarks.published_memory import memory_rows, summaries


def test_weights_gradients_and_optimizer_of_published_runs_are_predicted() -> None:
    rows = [row for row in memory_rows() if row.moment == "update"]
    assert len(rows) >= 50
    assert all(abs(row.deviation) < 0.08 for row in rows)
    (summary,) = (one for one in summaries(rows) if one.family == "all")
    assert summary.mape < 0.02


def test_peaks_of_published_runs_are_predicted_with_moments_in_fp32_or_bf16() -> None:
    rows = [row for row in memory_rows() if row.moment == "peak"]
    assert rows
    for row in rows:
        assert min(abs(row.deviation), abs(row.with_bf16_moments / row.published - 1)) < 0.10
