"""Laws of the time model: counts agree with the model's FLOPs, parts move with what they are made of."""

from dataclasses import replace

import pytest

from megagrok.config.schema import KernelsConfig, ModelConfig, MoEConfig
from megagrok.plan.constants import CONSTANTS
from megagrok.plan.cost import Machine
from megagrok.plan.estimate import estimate
from megagrok.plan.flops import training_flops_per_token
from megagrok.plan.gpus import find_gpu
from megagrok.plan.network import Span, message_seconds
from megagrok.plan.shape import MEGAGROK, Layout, Shape, habits_of
from megagrok.plan.step_time import step_seconds
from megagrok.plan.work import Message, Slice, head_work, layer_work

MODEL = ModelConfig(
    vocab_size=131072,
    hidden=8192,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=21760),
)
SHAPE = Shape.of(MODEL)
FLASH = replace(MEGAGROK, attention="flash")
FUSED = replace(MEGAGROK, dispatch="fused")
H100 = Machine(find_gpu("h100"), 8, 50e9)
LAYOUT = Layout(
    tensor=8, sequence=True, pipeline=8, virtual_pipeline=2, context=1, expert=8, expert_tensor=1, data=8, zero=1,
    seq_len=8192, micro_batch=1, num_micro_batches=64, precision="bf16", recompute="none",
)  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "context", "expert", "expert_tensor"),
    [(1, 1, 1, 1), (8, 1, 8, 1), (4, 2, 8, 1), (2, 1, 4, 2), (1, 4, 2, 1)],
)
def test_all_ranks_together_multiply_what_the_model_asks_for(tensor, context, expert, expert_tensor) -> None:
    layout = replace(LAYOUT, tensor=tensor, context=context, expert=expert, expert_tensor=expert_tensor)
    part = Slice.of(layout)
    layer, head = layer_work(SHAPE, part, FLASH, True), head_work(SHAPE, part)
    ranks = tensor * context
    counted = 3 * ranks * (SHAPE.layers * (layer.matmul_flops + layer.attention_flops) + head.matmul_flops)
    assert counted == pytest.approx(training_flops_per_token(MODEL, 8192) * 8192, rel=1e-9)


def test_attention_in_memory_computes_more_than_the_causal_half_and_all_of_it_under_context_parallelism() -> None:
    part = Slice.of(LAYOUT)
    flash, scores = (layer_work(SHAPE, part, habits, True).attention_flops for habits in (FLASH, MEGAGROK))
    # 32 runs of queries, each against all keys before its end: 33/64 of the square where the causal half is counted.
    assert scores / flash == pytest.approx(33 / 32)
    apart = replace(part, context=2)
    assert layer_work(SHAPE, apart, MEGAGROK, True).attention_flops == flash


def test_scores_that_stay_on_chip_cost_less_time_and_no_more_memory_and_only_where_the_run_names_the_kernel() -> None:
    triton = habits_of(KernelsConfig(attention="triton"))
    assert triton != MEGAGROK == habits_of(KernelsConfig()) == habits_of(KernelsConfig(attention="torch"))
    in_memory, on_chip = (estimate(SHAPE, LAYOUT, H100, habits) for habits in (MEGAGROK, triton))
    assert on_chip.seconds.attention < in_memory.seconds.attention
    assert on_chip.seconds.matmul == in_memory.seconds.matmul and on_chip.seconds.tensor == in_memory.seconds.tensor
    assert all(
        here.total <= there.total and here.activations == there.activations
        for here, there in zip(on_chip.stages, in_memory.stages, strict=True)
    )


def test_the_parts_of_a_step_are_the_step() -> None:
    result = estimate(SHAPE, LAYOUT, H100)
    assert result.tokens_per_second * result.seconds.total == pytest.approx(LAYOUT.tokens)
    assert result.mfu == result.hfu
    again = estimate(SHAPE, replace(LAYOUT, recompute="full"), H100)
    assert again.seconds.recompute > 0 and again.hfu > again.mfu and again.mfu < result.mfu


def test_a_slower_network_costs_communication_and_nothing_else() -> None:
    fast = step_seconds(SHAPE, replace(LAYOUT, expert=8, tensor=1, data=64), H100, MEGAGROK)
    slow = step_seconds(
        SHAPE, replace(LAYOUT, expert=8, tensor=1, data=64), replace(H100, network_bandwidth=5e9), MEGAGROK
    )
    assert slow.data > fast.data and slow.pipeline > fast.pipeline
    assert (slow.matmul, slow.attention, slow.memory_bound) == (fast.matmul, fast.attention, fast.memory_bound)


def test_more_micro_batches_leave_less_bubble_and_chunks_less_still() -> None:
    def share(layout: Layout) -> float:
        seconds = step_seconds(SHAPE, layout, H100, MEGAGROK)
        return seconds.bubble / seconds.total

    few, many = replace(LAYOUT, num_micro_batches=8), replace(LAYOUT, num_micro_batches=512)
    assert share(many) < share(LAYOUT) < share(few)
    # Chunks halve fill and drain, and halve them again; the wait for the head's stage stays.
    waits = [step_seconds(SHAPE, replace(few, virtual_pipeline=chunks), H100, MEGAGROK).bubble for chunks in (1, 2, 4)]
    assert waits[0] - waits[1] == pytest.approx(2 * (waits[1] - waits[2]))
    assert waits[1] < waits[0]


def test_ranks_in_a_node_talk_faster_than_ranks_apart_and_one_rank_is_silent() -> None:
    def seconds(ranks: int, stride: int) -> float:
        message = Message("tensor", "all_gather", 1e9)
        return message_seconds(message, Span(ranks, stride), H100, MEGAGROK, CONSTANTS, 1)

    assert seconds(1, 1) == 0
    assert seconds(8, 1) < seconds(8, 8)
    assert seconds(8, 1) < seconds(16, 1)


@pytest.mark.parametrize("ranks", [8, 16, 64, 512])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_a_token_that_goes_once_to_a_node_never_takes_longer(ranks: int, top_k: int) -> None:
    message, span = Message("expert", "all_to_all", 1e8), Span(ranks, 1)
    whole, once = (message_seconds(message, span, H100, habits, CONSTANTS, top_k) for habits in (MEGAGROK, FUSED))
    assert once <= whole


def test_fp8_of_the_dense_matrices_alone_leaves_the_experts_as_they_were() -> None:
    plain = step_seconds(SHAPE, LAYOUT, H100, MEGAGROK)
    alone = step_seconds(SHAPE, replace(LAYOUT, precision="fp8"), H100, MEGAGROK)
    both = step_seconds(SHAPE, replace(LAYOUT, precision="fp8"), H100, replace(MEGAGROK, experts_in_fp8=True))
    assert both.matmul < alone.matmul < plain.matmul
    assert plain.matmul - alone.matmul < 0.2 * plain.matmul


def test_routing_that_is_not_forced_is_waited_for() -> None:
    forced = step_seconds(SHAPE, LAYOUT, H100, replace(MEGAGROK, routing="balanced"))
    natural = step_seconds(SHAPE, LAYOUT, H100, MEGAGROK)
    assert natural.imbalance > forced.imbalance and natural.total > forced.total
