"""Failure rates and save costs: in proportion to size, and no further from what was measured than its own rounding."""

import json
from pathlib import Path

import pytest
from large_layout import TENSOR_8

from megagrok.config import decode_config
from megagrok.errors import ConfigError
from megagrok.plan import total_params, with_setting
from megagrok.plan.failures import DEATH_SECONDS, RATES, detection_seconds, find_rate
from megagrok.plan.save_cost import HOLD_BYTES_PER_SECOND, STORAGE_BYTES_PER_SECOND, WRITE_BYTES_PER_SECOND, save_cost

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: rate.name)
def test_failures_grow_in_proportion_to_gpus(rate) -> None:
    assert rate.per_day(16_384) == pytest.approx(2_048 * rate.per_day(8))
    assert rate.mtbf_seconds(1_000) * rate.per_day(1_000) == pytest.approx(86_400)


def test_the_rates_give_back_what_their_sources_say() -> None:
    assert find_rate("llama3").per_day(16_384) * 54 == pytest.approx(419)
    # Meta projects 1.8 h for 16,384 GPUs and 0.23 h for 131,072 from the rate of RSC-1 (arXiv:2410.21680).
    assert find_rate("rsc1").mtbf_seconds(16_384) / 3600 == pytest.approx(1.8, rel=0.01)
    assert find_rate("rsc1").mtbf_seconds(131_072) / 3600 == pytest.approx(0.23, rel=0.03)
    assert find_rate("opt").per_day(992) * 60 == pytest.approx(35 + 70)
    assert find_rate("BLOOM").per_day(384) * 7 == pytest.approx(1)


def test_an_unknown_rate_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'meta' is known; known: llama3, rsc1, rsc2, opt, bloom"):
        find_rate("meta")


def test_a_hang_is_found_after_its_limit_and_all_else_at_once() -> None:
    assert detection_seconds(DEATH_SECONDS) == pytest.approx(DEATH_SECONDS)
    assert detection_seconds(600.0) == pytest.approx(10.1, abs=0.1)
    assert detection_seconds(1200.0) > detection_seconds(600.0)


def test_the_cost_of_a_save_is_that_of_the_published_measurement() -> None:
    page = json.loads((ROOT / "docs/bench/checkpoint.json").read_text(encoding="utf-8"))
    (ours,) = [each for each in page["contenders"] if each["name"] == "megagrok, in the background"]
    hold, total = ours["stall_seconds"]["median"], ours["total_seconds"]["median"]
    bytes_a_rank = page["bytes"] / page["ranks"]
    assert pytest.approx(bytes_a_rank / hold, rel=0.01) == HOLD_BYTES_PER_SECOND
    assert pytest.approx(bytes_a_rank / (total - hold), rel=0.01) == WRITE_BYTES_PER_SECOND


def test_the_death_of_a_rank_takes_as_long_as_in_the_published_drill() -> None:
    (trial,) = json.loads((ROOT / "docs/reliability/kill.json").read_text(encoding="utf-8"))["trials"]
    ends = sorted(each["end_seconds"] for each in trial["rounds"] if each["end_seconds"] is not None)
    assert ends[int(0.99 * len(ends))] == pytest.approx(DEATH_SECONDS, abs=0.05)


@pytest.fixture(scope="module")
def run():
    return decode_config(ROOT / "configs/run/pretrain-286b.yaml", TENSOR_8).config


def test_all_ranks_together_save_the_state_once(run) -> None:
    cost = save_cost(run)
    assert cost.total_bytes == 12 * total_params(run.model)
    ranks = 512
    # The fullest rank has the embedding or the head besides its layers.
    assert cost.total_bytes / ranks <= cost.hold_seconds * HOLD_BYTES_PER_SECOND <= 1.1 * cost.total_bytes / ranks


def test_more_replicas_share_a_save_until_the_storage_is_full_and_all_of_them_read_the_weights(run) -> None:
    costs = [save_cost(with_setting(run, "parallel.data", data)) for data in (2, 8, 64, 1024)]
    holds, loads = [cost.hold_seconds for cost in costs], [cost.load_seconds for cost in costs]
    assert holds == sorted(holds, reverse=True)
    assert costs[-1].write_seconds == costs[-1].total_bytes / STORAGE_BYTES_PER_SECOND
    assert loads[1] < loads[0]
    assert loads[-1] > 10 * loads[1]


def test_a_hold_that_was_measured_elsewhere_takes_the_place_of_ours(run) -> None:
    assert save_cost(run, 40.0).hold_seconds == 40.0
    assert save_cost(run, 40.0).write_seconds == save_cost(run).write_seconds


def test_without_zero_one_rank_of_the_copies_saves_for_all(run) -> None:
    whole, shared = save_cost(with_setting(run, "parallel.zero", 0)), save_cost(run)
    # Eight ranks hold the same dense weights, and eight the same experts.
    assert whole.hold_seconds / shared.hold_seconds == pytest.approx(8, rel=1e-3)
