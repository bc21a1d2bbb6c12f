"""Factors of measured runs are found where they can be told, and used nowhere but on their own device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megagrok.config import RunConfig, load_config
from megagrok.config import to_dict as plain
from megagrok.errors import ConfigError
from megagrok.plan import training_flops_per_token, world_size
from megagrok.plan.calibration import COMMUNICATION, Measured, calibrate, read_calibration, write_calibration
from megagrok.plan.estimate import Machine, StepSeconds, estimate
from megagrok.plan.gpus import find_gpu
from megagrok.plan.measured import RunFolder, calibrate_runs
from megagrok.plan.shape import Layout, Shape

H100 = find_gpu("h100")
TINY = load_config(Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml").config
NOTHING = StepSeconds(*[0.0] * 13)


def run(compute: float, communication: float, measured: float, name: str = "a") -> Measured:
    return Measured(name, 8, 20, measured, replace(NOTHING, matmul=compute, tensor=communication))


def test_two_factors_are_found_from_runs_that_communicate_differently() -> None:
    runs = [run(c, m, 1.2 * c + 2.5 * m) for c, m in ((9.0, 0.5), (5.0, 4.0), (3.0, 1.0))]
    found = calibrate(H100, runs)
    assert found.told_apart
    assert (found.compute, found.communication) == pytest.approx((1.2, 2.5))
    assert all(abs(found.error(measured)) < 1e-9 for measured in runs)


def test_runs_that_communicate_alike_have_one_factor_for_all() -> None:
    runs = [run(c, 0.1 * c, 1.3 * 1.1 * c) for c in (1.0, 5.0, 9.0)]
    found = calibrate(H100, runs)
    assert not found.told_apart
    assert found.compute == found.communication == pytest.approx(1.3)


def test_a_factor_that_would_be_negative_is_not_believed() -> None:
    found = calibrate(H100, [run(10.0, 0.0, 20.0), run(10.0, 5.0, 15.0)])
    assert not found.told_apart and found.compute > 0


def test_the_first_factor_is_for_all_parts_that_are_no_communication() -> None:
    found = calibrate(H100, [run(c, m, 2 * c + 3 * m) for c, m in ((9.0, 0.5), (5.0, 4.0))])
    ones = StepSeconds(*[1.0] * 13)
    corrected = found.correct(ones)
    assert corrected.bubble == corrected.imbalance == corrected.optimizer == pytest.approx(2)
    assert corrected.expert == corrected.data == pytest.approx(3)
    assert corrected.total == pytest.approx(2 * (13 - len(COMMUNICATION)) + 3 * len(COMMUNICATION))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    found = calibrate(H100, [run(9.0, 0.5, 10.0), run(5.0, 4.0, 14.0, "b")])
    write_calibration(tmp_path / "c.json", found)
    assert read_calibration(tmp_path / "c.json") == found
    with pytest.raises(ConfigError, match="File exists"):
        write_calibration(tmp_path / "c.json", found)


def test_a_calibration_of_other_constants_is_refused(tmp_path: Path) -> None:
    write_calibration(tmp_path / "c.json", calibrate(H100, [run(9.0, 0.5, 10.0)]))
    page = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**page, "constants": "0" * 16}))
    with pytest.raises(ConfigError, match="other constants.* Make it again: megagrok plan --calibrate"):
        read_calibration(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1}', "model:\n  a: 1\n"])
def test_a_file_that_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match="is no calibration"):
        read_calibration(tmp_path / "c.json")


def test_factors_of_one_device_are_refused_on_another() -> None:
    found = calibrate(H100, [run(9.0, 0.5, 10.0)])
    found.require_gpu("H100")
    found.require_gpu(None)
    with pytest.raises(ConfigError, match="measured on h100, --gpu is h200"):
        found.require_gpu("h200")


def write_run(root: Path, config: RunConfig, seconds: list[float], peak: float) -> RunFolder:
    """A folder as a run leaves it: steps of these times, MFU against `peak` FLOP/s of all ranks."""
    root.mkdir()
    folder = RunFolder(root, root / "config.yaml", root / "metrics.jsonl")
    folder.config.write_text(yaml.safe_dump(plain(config)))
    tokens = config.train.global_batch * config.train.seq_len
    flops = tokens * training_flops_per_token(config.model, config.train.seq_len)
    lines = [
        {
            "kind": "step", "step": i + 1, "global_batch": config.train.global_batch, "step_seconds": step,
            "tokens_per_second": tokens / step, "mfu": flops / step / peak,
        }
        for i, step in enumerate(seconds)
    ]  # fmt: skip
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in [{"kind": "evaluation", "step": 0}, *lines]))
    return folder


def test_a_run_on_gpus_is_held_against_its_own_prediction(tmp_path: Path) -> None:
    config = replace(TINY, train=replace(TINY.train, precision="bf16"))
    predicted = estimate(
        Shape.of(config.model), Layout.of(config), Machine(H100, 1, H100.network_bandwidth)
    ).seconds.total
    # Slow first steps are warm-up, and one hiccup moves no median.
    seconds = [50 * predicted, 20 * predicted, *[1.25 * predicted] * 7, 9 * predicted]
    folder = write_run(tmp_path / "a", config, seconds, H100.bf16_flops)
    found = calibrate_runs([folder], "h100", 8)
    assert found.compute == pytest.approx(1.25)
    assert found.runs[0].steps == 8
    with pytest.raises(ConfigError, match="counted its MFU against 989 TFLOP/s per rank, a100 has 312"):
        calibrate_runs([folder], "a100", 8)
    with pytest.raises(ConfigError, match="needs --gpu NAME"):
        calibrate_runs([folder], None, 8)


def test_a_run_on_a_cpu_brings_its_own_peak(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", TINY, [0.5] * 12, 90e9 * world_size(TINY.parallel))
    found = calibrate_runs([folder], None, 8)
    assert found.gpu.name == "cpu"
    assert found.gpu.peak("fp32") == pytest.approx(90e9)
    assert found.correct(found.runs[0].predicted).total == pytest.approx(0.5)


def test_a_run_without_enough_steps_at_its_full_batch_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", TINY, [0.5] * 5, 90e9)
    with pytest.raises(ConfigError, match="has 4 steps at the full batch after the first quarter, needs 5"):
        calibrate_runs([folder], None, 8)
    folder.metrics.unlink()
    with pytest.raises(ConfigError, match="is no run that has trained"):
        calibrate_runs([folder], None, 8)
    folder.metrics.write_text('{"kind": "step"}\n')
    with pytest.raises(ConfigError, match="is damaged"):
        calibrate_runs([folder], None, 8)
