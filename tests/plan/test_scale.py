"""Strong and weak scaling: what has to stay stays, what has to grow grows, and no size disappears without a word."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from large_layout import TENSOR_8

from megagrok.cli import main
from megagrok.config import decode_config
from megagrok.errors import ConfigError
from megagrok.plan.batch import world_size
from megagrok.plan.estimate import Machine
from megagrok.plan.failures import RATES, RESTART_SECONDS, find_rate
from megagrok.plan.gpus import find_gpu
from megagrok.plan.scale import KINDS, Assumptions, critical_batch, ladder, scale
from megagrok.plan.scale_picture import draw
from megagrok.plan.scale_report import Scaling, to_json, to_text

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/run/pretrain-286b.yaml"
# Laws of scaling are not to depend on what fits today.
GPU = replace(find_gpu("h200"), memory_bytes=2**42)
MACHINE = Machine(GPU, 8, GPU.network_bandwidth)
SIZES = ladder("8..131072")


@pytest.fixture(scope="module")
def run():
    return decode_config(CONFIG, TENSOR_8).config


@pytest.fixture(scope="module")
def rungs(run):
    return {kind: scale(run, MACHINE, SIZES, kind, Assumptions()) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_size_is_dropped_and_each_either_works_or_says_why_not(rungs, kind) -> None:
    assert [rung.gpus for rung in rungs[kind]] == [2**n for n in range(3, 18)]
    assert all((rung.works is None) == bool(rung.problem) for rung in rungs[kind])
    assert sum(rung.works is not None for rung in rungs[kind]) >= 10


def test_strong_scaling_keeps_the_tokens_of_a_step_and_weak_scaling_those_of_a_gpu(run, rungs) -> None:
    batch = run.train.global_batch * run.train.seq_len
    for rung in rungs["strong"]:
        assert rung.works is None or rung.works.tokens_per_step == batch
    for rung in rungs["weak"]:
        assert rung.works is None or rung.works.tokens_per_step * world_size(run.parallel) == batch * rung.gpus


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_uses_all_of_its_gpus(rungs, kind) -> None:
    for rung in rungs[kind]:
        assert rung.works is None or rung.works.estimate.layout.world_size == rung.gpus


def test_both_kinds_agree_at_the_size_of_the_run_itself(run, rungs) -> None:
    own = SIZES.index(world_size(run.parallel))
    assert rungs["strong"][own] == rungs["weak"][own]


@pytest.mark.parametrize("kind", KINDS)
def test_failures_grow_and_the_effective_time_falls_with_gpus(rungs, kind) -> None:
    works = [rung.works for rung in rungs[kind] if rung.works]
    failures, ratios = [each.failures_per_day for each in works], [each.interval.ettr for each in works]
    assert failures == sorted(failures)
    assert ratios == sorted(ratios, reverse=True)
    assert all(each.ettr_as_set <= each.interval.ettr + 1e-12 for each in works)


def test_a_batch_that_does_not_divide_a_replica_that_does_not_and_a_gpu_that_is_too_small_are_told_apart(run) -> None:
    small = Machine(replace(GPU, memory_bytes=2**33), 8, GPU.network_bandwidth)
    strong = {rung.gpus: rung.problem for rung in scale(run, small, SIZES, "strong", Assumptions())}
    assert strong[32] == "the layout has 64 ranks a replica, needs a multiple of that"
    assert re.fullmatch(r"does not fit: a GPU would need \d+ GiB, h200 has 8", strong[512])
    assert "needs >= parallel.pipeline (8)" in strong[131_072]


def test_a_batch_beyond_those_that_were_found_useful_is_marked_and_one_within_is_not(rungs) -> None:
    marked = {rung.gpus: rung.works.is_beyond_known_batches for rung in rungs["weak"] if rung.works}
    assert not marked[1_024]
    assert marked[2_048]
    assert marked[131_072]
    assert not any(rung.works.is_beyond_known_batches for rung in rungs["strong"] if rung.works)
    assert critical_batch(15e12) == 128 * 2**20
    assert critical_batch(1e9) == 16 * 2**20


def test_a_ramp_that_begins_too_small_for_so_many_replicas_is_noted(rungs) -> None:
    noted = [rung.gpus for rung in rungs["strong"] if rung.works and any("ramp" in note for note in rung.works.notes)]
    assert noted == [32_768, 65_536]


def test_published_effective_times_are_met_at_their_sizes(run) -> None:
    """Llama 3 reports above 90 % on 16,384 GPUs, ByteRobust 97 % on 9,600 (arXiv:2407.21783, 2509.16293)."""
    (llama,) = scale(run, MACHINE, [16_384], "strong", Assumptions())
    (byte,) = scale(run, MACHINE, [8_192], "strong", Assumptions())
    assert llama.works.interval.ettr > 0.9
    assert byte.works.interval.ettr == pytest.approx(0.97, abs=0.02)


def test_dearer_saves_and_restarts_and_more_failures_leave_less(run) -> None:
    def at(**changed: object) -> float:
        (rung,) = scale(run, MACHINE, [4_096], "strong", Assumptions(**changed))
        return rung.works.interval.ettr

    assert at(hold_seconds=40.0) < at()
    assert at(restart_seconds=1800.0) < at()
    assert at(failures=find_rate("opt")) < at() < at(failures=find_rate("rsc2"))


@pytest.mark.slow
def test_the_fastest_layout_is_no_slower_than_the_runs_own(run, rungs) -> None:
    for rung in scale(run, MACHINE, [512, 4_096], "strong", Assumptions(), searches=True):
        own = rungs["strong"][SIZES.index(rung.gpus)]
        assert rung.works.tokens_per_step == own.works.tokens_per_step
        assert rung.works.estimate.seconds.total <= own.works.estimate.seconds.total


def test_searching_finds_a_layout_where_the_runs_own_has_too_many_ranks() -> None:
    tiny = decode_config(ROOT / "configs/run/tiny.yaml", []).config
    own = world_size(tiny.parallel) // tiny.parallel.data
    (rung,) = scale(tiny, MACHINE, [1], "strong", Assumptions(), searches=True)
    assert rung.works is not None
    if own > 1:
        assert scale(tiny, MACHINE, [1], "strong", Assumptions())[0].works is None


@pytest.mark.parametrize("text", ["8..131072", "512", "3..24", "1..1048576"])
def test_a_ladder_doubles_from_its_first_number_to_its_last(text: str) -> None:
    sizes = ladder(text)
    assert (sizes[0], sizes[-1]) == (int(text.split("..")[0]), int(text.split("..")[-1]))
    assert all(b == 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8..100", "Fix: 8..64 or 8..128"),
        ("16..8", "needs 1 <= first <= last"),
        ("0..8", "needs 1 <= first"),
        ("8..2000000", "<= 1048576"),
        ("8-64", "needs a number of GPUs or a range such as"),
        ("-8", "needs a number of GPUs"),
        ("", "needs a number of GPUs"),
    ],
)
def test_a_bad_range_is_refused_with_one_that_works(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ladder(text)


def scaling(run, rungs) -> Scaling:
    return Scaling(run, MACHINE, Assumptions(), False, rungs)


def test_the_text_has_a_row_for_each_size_and_says_what_it_rests_on(run, rungs) -> None:
    text = to_text(scaling(run, rungs), "scaling.svg")
    for kind in ("Strong", "Weak"):
        table = text.partition(f"## {kind} scaling")[2].partition("##")[0]
        assert re.findall(r"^\| +([\d,]+) \|", table, re.M) == [f"{size:,}" for size in SIZES]
    for word in ("arXiv:2407.21783", "MFU: model FLOPs", "Daly", "Young", "an assumption", "![", "bf16 peak of h200"):
        assert word in text
    assert all(rate.name in text for rate in RATES)


def test_the_json_has_every_size_and_only_numbers_that_json_knows(run, rungs) -> None:
    page = json.loads(to_json(scaling(run, rungs)), parse_constant=pytest.fail)
    assert [rung["gpus"] for rung in page["rungs"]["strong"]] == list(SIZES)
    assert page["assumed"]["restart_seconds"] == RESTART_SECONDS


def test_a_job_that_gets_nowhere_never_ends_and_has_no_bill(run) -> None:
    found = {"strong": scale(run, MACHINE, [65_536], "strong", Assumptions(restart_seconds=1e7))}
    assert found["strong"][0].works.bill is None
    assert "never" in to_text(scaling(run, found))
    json.loads(to_json(scaling(run, found)), parse_constant=pytest.fail)


def test_a_layout_that_works_at_no_size_leads_to_the_search_for_others(run, rungs) -> None:
    nothing = {"strong": scale(run, MACHINE, [8], "strong", Assumptions())}
    assert "--best" in to_text(scaling(run, nothing))
    assert "--best" not in to_text(scaling(run, rungs))


def test_the_same_numbers_draw_the_same_bytes(run, rungs) -> None:
    first, second = (draw(scaling(run, rungs)) for _ in range(2))
    assert first == second
    assert b"</svg>" in first
    assert b"<dc:date>" not in first


def test_a_picture_of_nothing_that_works_is_drawn(run) -> None:
    assert b"</svg>" in draw(scaling(run, {"strong": scale(run, MACHINE, [8], "strong", Assumptions())}))


def test_the_command_prints_a_table_and_draws(tmp_path, capsys) -> None:
    picture = tmp_path / "new" / "scaling.svg"
    command = ["scale", str(CONFIG), "--gpus", "512..1024", "--strong", "--price", "2", "--picture", str(picture)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "dollars" in text
    assert "Weak" not in text
    assert "](scaling.svg)" in text
    assert picture.read_bytes().startswith(b"<?xml")
    assert main([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rungs"]["strong"]) == 2


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--gpu", "h9000"], 5, "no peak FLOP/s known for the GPU 'h9000'; known: h100"),
        (["--gpus", "8..9"], 2, "Fix: 8..8 or 8..16"),
        (["--failures", "mine"], 2, "known: llama3"),
        (["--picture", "x.png"], 2, "needs a name that ends with .svg"),
        (["train.global_batch=8191"], 2, "needs a multiple of"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(options, status, said, capsys) -> None:
    assert main(["scale", str(CONFIG), *options]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint-seconds", "-1"],
        ["--restart-seconds", "nan"],
        ["--price", "inf"],
        ["--nodes-of", "0"],
        ["--strong", "--weak"],
    ],
)
def test_the_command_refuses_costs_that_are_none(options, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["scale", str(CONFIG), *options])
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err
