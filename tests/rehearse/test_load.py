"""Given loads: no choice is lost, peers agree with this rank, whose first expert is the fullest; others are refused."""

import pytest

from megagrok.config.schema import MoEConfig
from megagrok.errors import ConfigError
from megagrok.rehearse.load import Load

MOE = MoEConfig(num_experts=8, top_k=2, ffn_hidden=16)


@pytest.mark.parametrize("fullest", [None, 0.125, 0.3, 0.5])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("choices", [0, 1, 7, 16, 4096])
def test_every_choice_goes_to_one_expert(fullest: float | None, ranks: int, choices: int) -> None:
    for rank in range(ranks):
        load = Load.of(MOE, ranks, rank, fullest)
        sent = load.outgoing(choices)
        assert len(sent) == 8 and sum(sent) == choices and min(sent) >= 0
        incoming = load.incoming(sent)
        each = 8 // ranks
        assert incoming == sent[rank * each : (rank + 1) * each] * ranks


@pytest.mark.parametrize("rank", range(4))
def test_the_fullest_expert_is_the_first_of_this_rank(rank: int) -> None:
    sent = Load.of(MOE, 4, rank, 0.5).outgoing(4096)
    assert sent[2 * rank] == max(sent) == 2048


def test_balanced_is_even() -> None:
    assert Load.of(MOE, 4, 1, None).outgoing(4096) == [512] * 8


@pytest.mark.parametrize("fullest", [0.0, 0.1, 0.51, 1.0, -1.0, float("nan")])
def test_a_share_that_no_routing_has_is_refused(fullest: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0.125 \(balanced over 8 experts\) and 0.5"):
        Load.of(MOE, 4, 0, fullest)
