"""`megagrok plan` answers for a run or a model, keeps its tokens, writes what trains, and refuses in clear words."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megagrok.cli import main
from megagrok.config import load_config
from megagrok.errors import ConfigError
from megagrok.plan import CONVENTION, world_size
from megagrok.plan.estimate import StepSeconds
from megagrok.plan.proposal import with_seq_len
from megagrok.plan.proposal_text import differences
from megagrok.plan.shape import Layout

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, QUICK = str(CONFIGS / "run" / "tiny.yaml"), str(CONFIGS / "run" / "quickstart.yaml")
LARGE = str(CONFIGS / "run" / "pretrain-286b.yaml")
PLANS = sorted((CONFIGS.parent / "docs" / "plan" / "winners").glob("*.yaml"))
PRETRAIN = load_config(Path(LARGE)).config


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) in (2, 5)
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_the_answer_says_what_was_asked_what_won_why_and_by_which_convention(capsys) -> None:
    text = answer(capsys, QUICK, "--gpus", "8", "--gpu", "h100", "--price", "2", "--power-price", "0.1", "--top", "3")
    for part in ("on 8 h100 in nodes of 8", CONVENTION, "TFLOP/s (fp32) per h100", "First: ", "Second: ", "data sheet"):
        assert part in text
    for part in (
        "Memory of the first",
        "imbalance",
        "reserve",
        "GPU-hours: $",
        "per kWh",
        "A step of the first: ",
        "base: ",
    ):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row[:1] in (["1"], ["2"], ["3"], ["4"]) and len(row) > 10] == ["1", "2", "3"]


def test_json_has_the_same_numbers_and_they_add_up(capsys) -> None:
    page = json.loads(answer(capsys, QUICK, "--gpus", "8", "--gpu", "h200", "--json"))
    best = page["best"]
    times = [row["seconds"]["total"] for row in best]
    assert len(best) == 10 and times == sorted(times)
    for row in best:
        parts = {name: value for name, value in row["seconds"].items() if name != "total"}
        assert sum(parts.values()) == pytest.approx(row["seconds"]["total"])
        assert (
            row["peak_bytes"]
            == max(stage["total"] for stage in row["stages"])
            <= page["machine"]["gpu"]["memory_bytes"]
        )
        assert row["tokens_per_second"] * row["seconds"]["total"] == pytest.approx(page["tokens_per_step"])
    layouts = page["layouts"]
    assert layouts["legal"] == layouts["fitting"] + layouts["too_large"] + layouts["larger_still"]
    assert page["convention"] == CONVENTION
    assert page["bill"]["tokens"] == page["tokens_per_step"] * load_config(Path(QUICK)).config.train.steps


def test_the_written_file_is_the_winner_and_passes_check_on_as_many_ranks(tmp_path: Path, capsys) -> None:
    target = tmp_path / "deep" / "run.yaml"
    target.parent.mkdir()
    arguments = [QUICK, "optimizer.lr=1.5e-3", "train.steps=177", "--gpus", "8", "--gpu", "h100", "--json"]
    page = json.loads(answer(capsys, *arguments, "--precision", "bf16", "--seq", "128", "--write", str(target)))
    assert main(["check", str(target), "--world", "8"]) == 0
    capsys.readouterr()
    written, best = load_config(target).config, page["best"][0]["layout"]
    assert world_size(written.parallel) == 8
    for name in ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "data", "zero"):
        assert vars_of(written.parallel)[name] == best[name]
    for name in ("seq_len", "micro_batch", "precision", "recompute"):
        assert vars_of(written.train)[name] == best[name]
    assert (written.optimizer.lr, written.train.steps) == (1.5e-3, 177)
    quick = load_config(Path(QUICK)).config
    assert (written.model, written.data, written.name) == (quick.model, quick.data, quick.name)
    assert "A prediction, not a measurement." in target.read_text()
    assert "exists, and is not written over" in refusal(capsys, *arguments, "--write", str(target))


def vars_of(section: object) -> dict[str, object]:
    return {name: getattr(section, name) for name in type(section).__dataclass_fields__}  # type: ignore[attr-defined]


def test_the_file_s_own_layout_is_priced_beside_the_best_where_it_is_one_for_as_many_gpus(capsys) -> None:
    run = load_config(Path(QUICK)).config
    page = json.loads(answer(capsys, QUICK, "--gpus", str(world_size(run.parallel)), "--gpu", "h100", "--json"))
    assert page["own"]["layout"] == asdict(Layout.of(run))
    assert page["own"]["seconds"]["total"] >= page["best"][0]["seconds"]["total"]
    assert json.loads(answer(capsys, QUICK, "--gpus", "16", "--gpu", "h100", "--json"))["own"] is None


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_of_the_docs_passes_check_on_as_many_ranks_as_its_name_says(path: Path, capsys) -> None:
    assert main(["check", str(path), "--world", path.stem.split("-")[2]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [128, 512])
def test_the_winner_for_the_large_model_passes_check(gpus: int, tmp_path: Path, capsys) -> None:
    answer(capsys, LARGE, "--gpus", str(gpus), "--gpu", "b200", "--write", str(tmp_path / "run.yaml"))
    assert main(["check", str(tmp_path / "run.yaml"), "--world", str(gpus)]) == 0


@pytest.mark.parametrize("seq_len", [1024, 4096, 16384, 131072])
def test_another_sequence_length_keeps_the_tokens_of_every_step(seq_len: int) -> None:
    changed = with_seq_len(PRETRAIN, seq_len).train
    before = PRETRAIN.train
    assert changed.seq_len == seq_len
    assert changed.global_batch * seq_len == before.global_batch * before.seq_len
    for old, new in zip(before.batch_ramp, changed.batch_ramp, strict=True):
        assert new.global_batch * seq_len == old.global_batch * before.seq_len
        assert 0 <= new.until_samples * seq_len - old.until_samples * before.seq_len < seq_len
    assert changed.evaluate_samples * seq_len >= before.evaluate_samples * before.seq_len


def test_a_sequence_length_that_divides_no_step_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"--seq 3000, needs a divisor .* Nearest: 2048, 4096"):
        with_seq_len(PRETRAIN, 3000)


def test_a_model_file_is_planned_with_a_batch_that_is_said(capsys) -> None:
    model = str(CONFIGS / "model" / "mini.yaml")
    text = answer(capsys, model, "--gpus", "8", "--gpu", "h100", "--top", "1", "--tokens", "1e11")
    assert "a model file has no batch: 16,777,216 tokens are taken" in text
    assert "100 B tokens at this speed" in text and "base:" not in text
    assert "is a model" in refusal(capsys, model, "--gpus", "8", "--gpu", "h100", "--write", "x.yaml")


def test_where_nothing_fits_the_exit_status_is_1_and_it_says_what_would_help(capsys) -> None:
    few = ["model.num_layers=4", "parallel.pipeline=4", "parallel.virtual_pipeline=1"]
    assert main(["plan", LARGE, *few, "--gpus", "4", "--gpu", "l40s"]) == 1
    text = capsys.readouterr().out
    assert "Nothing fits in 44.3 GiB. Nearest: " in text and "too many" in text
    assert "What would help: " in text and "GPUs hold it" in text
    assert "base:" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8", "--gpu", "v100"], "no peak FLOP/s known for the GPU 'v100'; known: h100"),
        (["--gpus", "8"], "plan needs --gpu, one of h100"),
        (["--gpus", "12", "--gpu", "h100"], "--gpus 12, needs a multiple of --nodes-of (8)"),
        (["--gpus", "12", "--gpu", "h100"], "Nearest: 8 or 16."),
        (["--gpus", "7", "--gpu", "h100", "--nodes-of", "1"], "--gpus 7: no layout divides"),
        (["--gpus", "7", "--gpu", "h100", "--nodes-of", "1"], "Nearest that have one: 4 or 8 GPUs."),
        (["--gpus", "8", "--gpu", "a100", "--precision", "fp8"], "needs FP8 units; a100 has none"),
        (["--gpus", "8", "--gpu", "h100", "--seq", "2048"], "train.seq_len = 2048, needs <= model.max_positions"),
        (["--gpus", "8", "--gpu", "h100", "model.moe.top_k=99"], "model.moe.top_k = 99"),
        (["--gpu", "h100"], "plan needs a CONFIG and --gpus N"),
        (["--gpus", "8", "--calibration", QUICK], "is no calibration"),
        (["--calibrate", "/nowhere"], "/nowhere is no run that has trained"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_would_work(arguments: list[str], words: str, capsys) -> None:
    assert words in refusal(capsys, QUICK, *arguments)


def test_reasons_are_the_parts_that_differ_largest_first() -> None:
    zero = [0.0] * 13
    first, second = StepSeconds(10.0, *zero[1:]), StepSeconds(11.0, *zero[1:11], 3.0, 0.0)
    assert differences(first, second) == ("less bubble (-3 s), less matmul (-1 s)", "")
    assert differences(second, first) == ("", "more bubble (+3 s), more matmul (+1 s)")
