"""Days, GPU-hours, energy and money follow from speed by multiplication, and nothing is charged without a rate."""

import pytest

from megagrok.plan.gpus import find_gpu
from megagrok.plan.price import bill

H100 = find_gpu("h100")


def test_a_bill_is_what_one_reckons_by_hand() -> None:
    # 86.4 B tokens at 1 M a second are a day; 10.2 kW for eight boards, 1.56 times that for the site.
    found = bill(H100, 8, 86_400_000_000, 1e6, 2.5, 0.1)
    assert found.days == pytest.approx(1)
    assert found.gpu_hours == pytest.approx(8 * 24)
    assert found.megawatts == pytest.approx(0.0102 * 1.56)
    assert found.megawatt_hours == pytest.approx(0.0102 * 1.56 * 24)
    assert found.dollars == pytest.approx(8 * 24 * 2.5)
    assert found.power_dollars == pytest.approx(10.2 * 1.56 * 24 * 0.1)


def test_without_a_rate_there_is_no_price() -> None:
    found = bill(H100, 8, 10**9, 1e6)
    assert found.dollars is None and found.power_dollars is None


def test_twice_the_gpus_at_twice_the_speed_cost_the_same_in_half_the_time() -> None:
    one, two = bill(H100, 64, 10**12, 1e6, 2.0, 0.1), bill(H100, 128, 10**12, 2e6, 2.0, 0.1)
    assert two.days == pytest.approx(one.days / 2)
    assert (two.gpu_hours, two.dollars, two.power_dollars) == pytest.approx(
        (one.gpu_hours, one.dollars, one.power_dollars)
    )
