"""Finished runs of ours beside what `estimate` says of them: the input of a calibration.

What a run's folder tells is its configuration and the time, batch and MFU of each step; the MFU gives away the peak
that it was counted against. On a GPU that is the data sheet's, so the GPU has to be named and is held against it. On a
CPU it was measured: the machine is then a device with that peak, and with a memory and a network that nobody measured,
which the factor takes in.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megagrok.config import RunConfig, load_config
from megagrok.errors import ConfigError
from megagrok.plan.batch import world_size
from megagrok.plan.calibration import Calibration, Measured, calibrate
from megagrok.plan.estimate import Machine, estimate
from megagrok.plan.flops import training_flops_per_token
from megagrok.plan.gpus import Gpu, find_gpu
from megagrok.plan.shape import Layout, Shape

UNKNOWN_BYTES = 2**50
"""Memory of a CPU rank: no run tells it, and every layout fits."""
LEAST_STEPS = 5
"""Measured steps that a median needs."""
WARM_UP = 0.25
"""Share of the steps, at the start, that are left out."""
FASTEST_CPU = 5e12
"""FLOP/s of a rank: above is no CPU."""
CPU_MEMORY_BANDWIDTH, CPU_LINK_BANDWIDTH = 10e9, 5e9
"""Bytes per second of a rank. Nominal: one core of a server, and a copy through shared memory."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The two files of a run that are read."""

    root: Path
    config: Path
    metrics: Path


@dataclass(frozen=True, slots=True)
class _Steps:
    run: RunConfig
    seconds: tuple[float, ...]
    peak_of_rank: float


def calibrate_runs(folders: Sequence[RunFolder], gpu_name: str | None, gpus_per_node: int) -> Calibration:
    """Compare each run with its prediction on the machine that all ran on.  Raises ConfigError or MachineError."""
    measured = [_read(folder) for folder in folders]
    gpu = _device(measured, folders, gpu_name)
    runs = []
    for folder, steps in zip(folders, measured, strict=True):
        world = world_size(steps.run.parallel)
        machine = Machine(gpu, min(gpus_per_node, world), gpu.network_bandwidth)
        predicted = estimate(Shape.of(steps.run.model), Layout.of(steps.run), machine).seconds
        runs.append(Measured(str(folder.root), world, len(steps.seconds), median(steps.seconds), predicted))
    return calibrate(gpu, runs)


def _device(measured: Sequence[_Steps], folders: Sequence[RunFolder], name: str | None) -> Gpu:
    peaks = [steps.peak_of_rank for steps in measured]
    if name is None and max(peaks) < FASTEST_CPU:
        if len({steps.run.train.precision == "bf16" for steps in measured}) > 1:
            raise ConfigError("--calibrate: runs of one precision at a time on a CPU, their peaks are not one device's")
        peak = median(peaks)
        # All runs have one precision, so the other's peak is never asked for.
        return Gpu(
            "cpu", (), peak, peak, 0.0, UNKNOWN_BYTES, CPU_MEMORY_BANDWIDTH, CPU_LINK_BANDWIDTH, CPU_LINK_BANDWIDTH, 0,
            "median of the peaks that the runs measured; memory size unknown, bandwidths nominal",
        )  # fmt: skip
    if name is None:
        raise ConfigError("--calibrate: runs on GPUs do not say which; needs --gpu NAME")
    gpu = find_gpu(name)
    for folder, steps in zip(folders, measured, strict=True):
        peak = gpu.peak(steps.run.train.precision)
        if abs(steps.peak_of_rank / peak - 1) > 0.02:
            raise ConfigError(
                f"{folder.root} counted its MFU against {steps.peak_of_rank / 1e12:.3g} TFLOP/s per rank, {gpu.name} "
                f"has {peak / 1e12:.4g} in {steps.run.train.precision}: it ran on another device. Fix: --gpu."
            )
    return gpu


def _read(folder: RunFolder) -> _Steps:
    try:
        lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{folder.root} is no run that has trained: {folder.metrics.name}: {error.strerror}"
        ) from error
    run = load_config(folder.config).config
    try:
        records = [json.loads(line) for line in lines]
        steps = [
            (float(record["step_seconds"]), float(record["tokens_per_second"]), record["mfu"])
            for record in records
            if record["kind"] == "step" and record["global_batch"] == run.train.global_batch
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder.metrics} is damaged: {error}") from error
    steps = steps[int(WARM_UP * len(steps)) :]
    if len(steps) < LEAST_STEPS:
        raise ConfigError(
            f"{folder.metrics} has {len(steps)} steps at the full batch after the first quarter, needs {LEAST_STEPS}"
        )
    peaks = [speed * training_flops_per_token(run.model, run.train.seq_len) / mfu for _, speed, mfu in steps if mfu]
    if not peaks:
        raise ConfigError(f"{folder.metrics} has no MFU: the peak of its device is not known")
    return _Steps(run, tuple(seconds for seconds, _, _ in steps), median(peaks) / world_size(run.parallel))
