"""Evaluation measures the model and leaves no trace of it: not in gradients, statistics, weights or random streams."""

from dataclasses import replace

import pytest
import tolerance
import torch
from layouts import MODEL, RESIDUAL, TIED, Step, batch_of, copies, in_tiers, make_run, start, take_step, tokens_of
from ranks import run_ranks
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.config.schema import ModelConfig, ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.model.loss import IGNORED_LABEL, cross_entropy_sum
from megagrok.model.reference import make_reference
from megagrok.parallel.ranks import Ranks
from megagrok.plan import world_size
from megagrok.platform import find_platform

DEEP = replace(MODEL, num_layers=4)
LAYOUTS = {
    "one rank": (RESIDUAL, ParallelConfig(), "fp32"),
    "experts, ZeRO 2": (MODEL, ParallelConfig(data=2, expert=2, zero=2), "fp32"),
    "tensor": (RESIDUAL, ParallelConfig(tensor=2, sequence=True), "fp32"),
    "tied stages": (TIED, ParallelConfig(pipeline=2), "fp32"),
    "interleaved": (DEEP, ParallelConfig(pipeline=2, virtual_pipeline=2), "fp32"),
    "context": (MODEL, ParallelConfig(context=2), "fp32"),
    "bf16": (MODEL, ParallelConfig(data=2), "bf16"),
}
HELD_OUT = 77


def labels_of(model: ModelConfig) -> Tensor:
    _, labels_BS = tokens_of(make_run(model), HELD_OUT)
    labels_BS[0, 3:9] = IGNORED_LABEL
    return labels_BS


def with_and_without(ranks: Ranks, name: str) -> tuple[list[list[Step]], list[list[Fragment]], list[tuple[float, int]]]:
    """Two steps and the state after them: of an engine that evaluates wherever it may, and of one that never does."""
    model, parallel, precision = LAYOUTS[name]
    run = make_run(model, parallel, precision=precision, recompute="full")
    groups = start(run)
    held_out = batch_of(run, HELD_OUT, groups, labels_of(model))
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    histories, states, evaluations = [], [], []
    for evaluates in (True, False):
        engine = build_engine(run, groups, find_platform())
        history = []
        for number in range(2):
            batch = batch_of(run, number, groups)
            if not evaluates:
                history.append(take_step(engine, batch))
                continue
            evaluations.append(engine.evaluate(held_out))
            totals = engine.forward_backward(batch)
            evaluations.append(engine.evaluate(held_out))
            engine.reduce_gradients()
            gradients = copies(engine.gradient_fragments())
            evaluations.append(engine.evaluate(held_out))
            history.append(Step(totals, gradients, engine.step(1e-2)))
            assert all(chunk.training for chunk in engine._chunks)
        histories.append(history)
        states.append(copies(engine.state_fragments()))
    assert torch.equal(torch.get_rng_state(), stream)
    return histories, states, evaluations


@pytest.mark.parametrize("name", in_tiers(LAYOUTS, slow=("experts, ZeRO 2", "tied stages", "context")))
def test_evaluation_is_exact_and_leaves_no_trace(name: str) -> None:
    model, parallel, precision = LAYOUTS[name]
    by_rank = run_ranks(with_and_without, world_size(parallel), name=name)
    for histories, states, _ in by_rank:
        for looked, plain in zip(*histories, strict=True):
            assert looked.update == plain.update
            assert torch.equal(looked.totals.tokens_per_expert_LE, plain.totals.tokens_per_expert_LE)
            assert (looked.totals.ce_sum, looked.totals.z_sum) == (plain.totals.ce_sum, plain.totals.z_sum)
            assert same(looked.gradients, plain.gradients)
        assert same(*states)
    run = make_run(model)
    tokens_BS, labels_BS = tokens_of(run, HELD_OUT)[0], labels_of(model)
    num_tokens = int((labels_BS != IGNORED_LABEL).sum())
    with torch.no_grad():
        loss = float(cross_entropy_sum(make_reference(model, run.train.seed)(tokens_BS).logits_BSV, labels_BS))
    limit = tolerance.LAYOUT_LOSS if precision == "fp32" else tolerance.BF16_LAYOUT_LOSS
    for _, _, evaluations in by_rank:
        assert evaluations == by_rank[0][2]
        assert all(number == num_tokens for _, number in evaluations)
        assert abs(evaluations[0][0] - loss) / num_tokens < limit
        # Nothing moves between evaluations of one step, and the step between moves the weights.
        assert len({loss_sum for loss_sum, _ in evaluations[:3]}) == 1
        assert evaluations[3] != evaluations[2]


def same(some: list[Fragment], others: list[Fragment]) -> bool:
    pairs = list(zip(some, others, strict=True))
    return bool(pairs) and all(one.key == other.key and torch.equal(one.data, other.data) for one, other in pairs)


def evaluate_any_size(ranks: Ranks) -> tuple[float, float]:
    """The held-out loss of four samples at once, and of three and one."""
    run = make_run(parallel=ParallelConfig(pipeline=2))
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    batch = batch_of(run, HELD_OUT, groups)
    at_once, _ = engine.evaluate(batch)
    parts = [slice(0, 3), slice(3, 4)]
    in_parts = [
        engine.evaluate(replace(batch, tokens_MBS=batch.tokens_MBS[part], labels_MBS=batch.labels_MBS[part]))
        for part in parts
    ]
    return at_once, sum(loss for loss, _ in in_parts)


def test_an_evaluation_may_be_cut_anywhere() -> None:
    for at_once, in_parts in run_ranks(evaluate_any_size, 2):
        assert in_parts == pytest.approx(at_once, rel=1e-6)


def outputs_with_a_graph(ranks: Ranks) -> list[bool]:
    """Whether the model's outputs keep what a backward pass would need: in evaluation, then in training."""
    run = make_run()
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    kept: list[bool] = []
    engine._chunks[0].register_forward_hook(lambda module, inputs, losses: kept.append(losses.requires_grad))
    batch = batch_of(run, HELD_OUT, groups)
    first = replace(batch, tokens_MBS=batch.tokens_MBS[:1], labels_MBS=batch.labels_MBS[:1])
    engine.evaluate(first)
    engine.forward_backward(first)
    return kept


def test_evaluation_keeps_nothing_for_a_backward_pass() -> None:
    assert run_ranks(outputs_with_a_graph, 1) == [[False, True]]
