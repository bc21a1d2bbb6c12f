"""bf16 computes in bf16 and remembers in fp32: sums of gradients, weights and their steps, on any layout."""

from dataclasses import dataclass, replace

import pytest
import tolerance
import torch
from layouts import MODEL, RESIDUAL, Step, assert_close, batch_of, copies, distance, make_run, of_kind, start, take_step
from layouts import whole as merge
from ranks import run_ranks
from torch import Tensor

from megagrok.config.schema import OptimizerConfig, ParallelConfig, RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.engine import Engine, build_engine
from megagrok.errors import MachineError
from megagrok.parallel.ranks import Ranks
from megagrok.plan import check, world_size
from megagrok.platform import find_platform

NUM_MICRO_BATCHES = 8
# The load of a step's own micro-batch: a micro-batch then gives the same gradient whatever came before it.
PER_MICRO_BATCH = replace(RESIDUAL, moe=replace(RESIDUAL.moe, balance_loss="micro_batch"))


def gradients_of(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    """Gradients of a batch, before any step; leaves none behind."""
    engine.forward_backward(batch)
    engine.reduce_gradients()
    gradients = of_kind("gradient", merge([copies(engine.gradient_fragments())]))
    engine.step(lr=0.0)
    return gradients


def sums_of_micro_batches(ranks: Ranks) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The gradient of a step of eight micro-batches, and of eight steps of one each."""
    run = make_run(
        PER_MICRO_BATCH, precision="bf16", global_batch=NUM_MICRO_BATCHES, evaluate_samples=NUM_MICRO_BATCHES
    )
    engine = build_engine(run, start(run), find_platform())
    batch = batch_of(run, 0)
    singles = [
        Batch(batch.tokens_MBS[number : number + 1], batch.labels_MBS[number : number + 1], (), ())
        for number in range(NUM_MICRO_BATCHES)
    ]
    return gradients_of(engine, batch), [gradients_of(engine, single) for single in singles]


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    """Alone, a micro-batch's loss is divided by an eighth of the tokens: a power of two, so the bits stay the same."""
    accumulated, singles = run_ranks(sums_of_micro_batches, 1)[0]
    has_lost_in_bf16 = []
    for name, gradient in accumulated.items():
        assert gradient.dtype == torch.float32
        in_fp32, in_bf16 = torch.zeros_like(gradient), torch.zeros_like(gradient, dtype=torch.bfloat16)
        for single in singles:
            part = single[name] / NUM_MICRO_BATCHES
            assert torch.equal(part, part.to(torch.bfloat16).float()), f"{name}: one micro-batch computes in bf16"
            in_fp32 += part
            in_bf16 += part.to(torch.bfloat16)
        assert torch.equal(gradient, in_fp32), name
        has_lost_in_bf16.append(not torch.equal(gradient, in_bf16.float()))
    # The law could be seen broken: summed in bf16, every gradient would be another.
    assert all(has_lost_in_bf16)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that compute, and masters, by name."""

    computing: dict[str, Tensor]
    masters: dict[str, Tensor]


def weights_of(engine: Engine) -> Weights:
    masters = of_kind("weight", merge([copies(engine.state_fragments())]))
    computing = {name: torch.empty_like(master) for name, master in masters.items()}
    for item in engine.local_parameters:
        for part in item.parts:
            place = tuple(slice(low, low + size) for low, size in zip(part.start, part.shape, strict=True))
            block = item.parameter.data.flatten()[part.offset : part.offset + part.size]
            computing[part.name][place] = block.view(part.shape).float()
    return Weights(computing, masters)


def small_steps(ranks: Ranks, num_steps: int) -> list[Weights]:
    run = make_run(precision="bf16", optimizer=OptimizerConfig(lr=1e-4, eps=1e-5, weight_decay=0.0))
    engine = build_engine(run, start(run), find_platform())
    history = [weights_of(engine)]
    for _ in range(num_steps):
        take_step(engine, batch_of(run, 0), lr=1e-4)
        history.append(weights_of(engine))
    return history


def test_steps_smaller_than_a_bf16_ulp_add_up_in_the_master_weights() -> None:
    history = run_ranks(small_steps, 1, num_steps=12)[0]
    for weights in history:
        for name, master in weights.masters.items():
            assert master.dtype == torch.float32
            assert torch.equal(weights.computing[name], master.to(torch.bfloat16).float()), name
    name = "lm_head.weight"
    first, second, last = (history[step].masters[name] for step in (0, 1, -1))
    half_ulp = first.abs().clamp(min=1e-30).log2().floor().exp2() * 2.0**-8
    moved_once = (second - first).abs()
    is_small_step = (moved_once > 0) & (moved_once < half_ulp / 2)
    assert int(is_small_step.sum()) > 100
    # One such step leaves the bf16 weight as it was; twelve of them have moved it where they went one way.
    stayed = history[1].computing[name] == history[0].computing[name]
    assert bool(stayed[is_small_step].all())
    went_far = is_small_step & ((last - first).abs() > 2 * half_ulp)
    assert int(went_far.sum()) > 20
    assert bool((history[-1].computing[name] != history[0].computing[name])[went_far].all())


SPREAD = {
    "data": ParallelConfig(data=2),
    "stages": ParallelConfig(pipeline=2),
    "experts": ParallelConfig(data=2, expert=2),
    "tensor and sequence": ParallelConfig(tensor=2, sequence=True),
    "tensor, sequence and experts": ParallelConfig(tensor=2, sequence=True, expert=2),
}
# A micro-batch goes through the same matrix products as on one rank; only the fp32 sums come in another order.
EXACT_IN_A_MICRO_BATCH = ("data", "stages")


def bf16_run(parallel: ParallelConfig) -> RunConfig:
    run = make_run(RESIDUAL, parallel, precision="bf16")
    # A seed with which no token stands so near between two experts that rounding moves it in the first step.
    return replace(run, train=replace(run.train, seed=2))


def three_steps(ranks: Ranks, parallel: ParallelConfig) -> list[Step]:
    run = bf16_run(parallel)
    groups = start(run)
    engine = build_engine(run, groups, find_platform())
    return [take_step(engine, batch_of(run, number, groups)) for number in range(3)]


@pytest.fixture(scope="module")
def alone() -> list[Step]:
    return run_ranks(three_steps, 1, parallel=ParallelConfig())[0]


@pytest.mark.parametrize("name", SPREAD)
def test_bf16_on_a_layout_stays_within_the_roundings_that_it_moves(name: str, alone: list[Step]) -> None:
    by_rank = run_ranks(three_steps, world_size(SPREAD[name]), parallel=SPREAD[name])
    is_exact = name in EXACT_IN_A_MICRO_BATCH
    assert torch.equal(by_rank[0][0].totals.tokens_per_expert_LE, alone[0].totals.tokens_per_expert_LE)
    first = of_kind("gradient", merge(steps[0].gradients for steps in by_rank))
    expected = of_kind("gradient", merge([alone[0].gradients]))
    assert_close(first, expected, tolerance.LAYOUT_GRADIENT if is_exact else tolerance.BF16_LAYOUT_GRADIENT)
    for number, before in enumerate(alone):
        for steps in by_rank:
            limit = tolerance.LAYOUT_LOSS if is_exact and number == 0 else tolerance.BF16_LAYOUT_LOSS
            assert abs(steps[number].loss - before.loss) < limit
            assert steps[number].update.grad_norm == pytest.approx(
                before.update.grad_norm, rel=tolerance.BF16_LAYOUT_GRADIENT
            )


def test_bf16_is_near_fp32(alone: list[Step]) -> None:
    in_fp32 = run_ranks(in_full_precision, 1)[0]
    assert abs(alone[0].loss - in_fp32.loss) < 20 * tolerance.BF16_LAYOUT_LOSS
    name = "gradient/lm_head.weight"
    assert distance(merge([alone[0].gradients])[name], merge([in_fp32.gradients])[name]) < 0.1


def in_full_precision(ranks: Ranks) -> Step:
    run = bf16_run(ParallelConfig())
    run = replace(run, train=replace(run.train, precision="fp32"))
    return take_step(build_engine(run, start(run), find_platform()), batch_of(run, 0))


def build_in_fp8(ranks: Ranks) -> None:
    run = make_run(replace(MODEL, moe=replace(MODEL.moe, ffn_hidden=48)), precision="fp8")
    build_engine(run, start(run), find_platform())


def test_fp8_without_a_gpu_is_refused_in_one_sentence_before_anything_is_built() -> None:
    with pytest.raises(MachineError, match=r"train.precision = fp8, needs an NVIDIA GPU") as refused:
        run_ranks(build_in_fp8, 1)
    assert "Traceback" not in str(refused.value).splitlines()[0]


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stages_of_zero_that_would_sum_in_bf16_are_refused(zero: int, precision: str) -> None:
    run = make_run(parallel=ParallelConfig(zero=zero), precision=precision, is_checked=False)
    problems = [problem for problem in check(run) if problem.key == "parallel.zero"]
    assert [problem.text for problem in problems] == [
        f"parallel.zero = {zero} with train.precision = {precision}, needs 1: "
        "DeepSpeed accumulates gradients in fp32 at that stage only."
    ]
