"""The oracle's two answers agree with each other, and its twin is one on which rounding stays small."""

from dataclasses import replace

import pytest
import torch
from verify_models import TINY

from megagrok.config import ParallelConfig
from megagrok.model.loss import expert_load
from megagrok.model.reference import make_reference
from megagrok.verify import tolerance
from megagrok.verify.grid import Layout
from megagrok.verify.oracle import ask, quiet_twin, walk
from megagrok.verify.run import Request
from megagrok.verify.twin import CLIP_NORM, Switches

RUN = Request(model=TINY, switches=Switches(), own=None, steps=2).twin(Layout(ParallelConfig()))


def test_asking_along_the_way_gives_what_the_walk_found() -> None:
    way = walk(RUN, torch.float64)
    one_step = replace(RUN, train=replace(RUN.train, steps=1))
    first = dict(make_reference(RUN.model, RUN.train.seed, torch.float64).named_parameters())
    answer = ask(RUN, 0, {name: weight.detach() for name, weight in first.items()}, None)
    later = ask(RUN, 1, walk(one_step, torch.float64).weights, expert_load(answer.tokens_per_expert_LE))
    for asked, walked in zip((answer.losses, later.losses), way.losses, strict=True):
        assert (asked.ce, asked.balance, asked.z) == pytest.approx((walked.ce, walked.balance, walked.z), rel=1e-12)


def test_every_step_of_a_twin_is_clipped() -> None:
    first = dict(make_reference(RUN.model, RUN.train.seed, torch.float64).named_parameters())
    answer = ask(RUN, 0, {name: weight.detach() for name, weight in first.items()}, None)
    assert answer.clip_coefficient == pytest.approx(CLIP_NORM / answer.grad_norm, rel=1e-4)
    assert answer.clip_coefficient < 0.5


def test_a_quiet_twin_spends_less_than_half_of_the_tolerances_on_rounding() -> None:
    run, true = quiet_twin(RUN)
    rounded = walk(run, torch.float32)
    for a, b in zip(rounded.losses, true.losses, strict=True):
        assert abs(a.ce - b.ce) < tolerance.LOSS / 2
    assert all((rounded.weights[name] - w).abs().max() < tolerance.WEIGHTS / 2 for name, w in true.weights.items())
    assert true.smallest_gap > 0


def test_only_a_balance_loss_over_micro_batches_sees_their_size() -> None:
    for balance_loss, sees in (("global_batch", False), ("micro_batch", True)):
        model = replace(TINY, moe=replace(TINY.moe, balance_loss=balance_loss))
        request = Request(model=model, switches=Switches(), own=None, steps=1)
        one, two = (
            walk(request.twin(Layout(ParallelConfig(), micro_batch=size)), torch.float64).losses[0].balance
            for size in (1, 2)
        )
        assert (abs(one - two) > 1e-9) == sees
