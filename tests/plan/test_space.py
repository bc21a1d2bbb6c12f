"""The layouts that a search looks at are those that `check` accepts: all of them, and no others."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megagrok.config import ParallelConfig, RunConfig, load_config
from megagrok.config.schema import Precision
from megagrok.plan import check, with_setting
from megagrok.plan.check import RULES
from megagrok.plan.rules import Rule
from megagrok.plan.space import families, unalterable

RUNS = Path(__file__).parents[2] / "configs" / "run"
PRETRAIN = load_config(RUNS / "pretrain-286b.yaml").config
SMALL = load_config(
    RUNS / "tiny.yaml",
    (
        "model.num_layers=4",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.moe.num_experts=4",
        "train.seq_len=24",
        "train.global_batch=12",
        "train.evaluate_samples=288",
        "model.max_positions=64",
    ),
).config


def layouts_of(world: int, num_experts: int, num_chunks: int) -> Iterator[ParallelConfig]:
    counts = [count for count in range(1, world + 1) if world % count == 0]
    for tensor, context, pipeline, data in product(counts, repeat=4):
        if tensor * context * pipeline * data != world:
            continue
        for chunks, expert, sequence in product(range(1, num_chunks + 1), range(1, num_experts + 1), (False, True)):
            for zero in (0, 1, 2):
                yield ParallelConfig(
                    tensor=tensor,
                    sequence=sequence,
                    pipeline=pipeline,
                    virtual_pipeline=chunks,
                    context=context,
                    expert=expert,
                    data=data,
                    zero=zero,
                )


@pytest.mark.parametrize(("world", "precision"), [(2, "fp32"), (2, "bf16"), (4, "fp32")])
def test_every_layout_that_check_accepts_is_enumerated_and_no_other(world: int, precision: Precision) -> None:
    run = replace(SMALL, train=replace(SMALL.train, precision=precision))
    accepted = set()
    for parallel, micro_batch in product(layouts_of(world, 4, 2), (1, 2, 3, 4, 6, 12)):
        candidate = replace(run, parallel=parallel, train=replace(run.train, micro_batch=micro_batch))
        if not check(candidate, world):
            accepted.add((parallel, micro_batch))
    enumerated = [
        (found.parallel, found.train.micro_batch)
        for family in families(run, world, [precision])
        for found in family
        if found.parallel.virtual_pipeline <= 2
    ]
    assert len(enumerated) == len(set(enumerated))
    assert set(enumerated) == accepted
    assert len(accepted) > 20


def test_every_enumerated_layout_of_the_large_model_passes_check() -> None:
    every = [run for family in families(PRETRAIN, 16, ["bf16", "fp8"]) for run in family]
    for run in every[:: len(every) // 200]:
        assert not check(run, 16), run.parallel


def test_a_family_differs_in_its_micro_batch_alone_and_starts_with_the_smallest() -> None:
    for family in families(PRETRAIN, 16, ["bf16"]):
        sizes = [run.train.micro_batch for run in family]
        assert sizes == sorted(set(sizes))
        assert len({(run.parallel, run.train.precision) for run in family}) == 1


def test_evaluation_is_stretched_to_what_a_layout_can_do_and_never_shortened() -> None:
    asked = PRETRAIN.train.evaluate_samples
    stretched = [run for family in families(PRETRAIN, 16, ["bf16"]) for run in family]
    assert all(asked <= run.train.evaluate_samples for run in stretched)
    assert any(asked < run.train.evaluate_samples for run in stretched)


def test_what_no_layout_can_cure_is_told_apart() -> None:
    too_long = with_setting(PRETRAIN, "train.seq_len", 2 * PRETRAIN.model.max_positions)
    assert [problem.key for problem in unalterable(too_long)] == ["train.seq_len"]
    assert not unalterable(with_setting(PRETRAIN, "parallel.tensor", 3))


class Watched:
    """A section of a configuration that notes the settings that are read from it."""

    def __init__(self, section: object, place: str, read: set[str]) -> None:
        self._section, self._place, self._read = section, place, read

    def __getattr__(self, name: str) -> object:
        value, key = getattr(self._section, name), f"{self._place}{name}"
        if name in ("model", "moe", "parallel", "train", "schedule", "optimizer", "data") and not isinstance(
            value, int
        ):
            return Watched(value, f"{key}.", self._read)
        self._read.add(key)
        return value


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.find.__name__)
def test_a_rule_names_every_setting_it_looks_at(rule: Rule) -> None:
    # The search asks a rule once what it names is chosen: one that looks at more would be asked too early.
    broken = {"parallel.tensor": 3, "parallel.pipeline": 5, "parallel.expert": 7, "parallel.context": 3}
    runs: list[RunConfig] = [PRETRAIN, SMALL, *(with_setting(PRETRAIN, key, value) for key, value in broken.items())]
    runs += [with_setting(PRETRAIN, "train.precision", "fp8"), with_setting(PRETRAIN, "parallel.sequence", False)]
    runs += [with_setting(PRETRAIN, "data.tokenizer_vocab_size", 10**6), with_setting(PRETRAIN, "train.steps", 1)]
    for run in runs:
        read: set[str] = set()
        list(rule.find(Watched(run, "", read)))  # type: ignore[arg-type]
        assert read <= set(rule.reads)
