"""What is tried: a grid that reaches every axis and crowd, on a twin that keeps every switch of the user's run."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.config import ModelConfig, ParallelConfig, decode_config, is_model_file, load_model_config
from megagrok.verify.choices import BREAK_NAMES, GRID_NAMES
from megagrok.verify.grid import MOST_RANKS, Layout, layouts_of, shrink_layout
from megagrok.verify.run import Request
from megagrok.verify.twin import Switches, num_twin_experts, shrink, twin_batch

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted([*CONFIGS.glob("model/*.yaml"), *CONFIGS.glob("run/*.yaml")])
BIG = load_model_config(CONFIGS / "model" / "grok2-270b.yaml")


def request_of(path: Path, grid: str = "default") -> Request:
    if is_model_file(path):
        return Request(model=load_model_config(path), switches=Switches(), own=None, grid=grid)
    run = decode_config(path).config
    return Request(model=run.model, switches=Switches.of(run), own=run.parallel, grid=grid)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_every_layout_of_a_grid_passes_the_plans_check_for_every_shipped_config(path: Path, grid: str) -> None:
    request = request_of(path, grid)
    for layout in request.layouts():
        request.twin(layout)  # fails on a problem
        assert layout.num_ranks <= MOST_RANKS


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_default_grid_has_two_dozen_layouts_with_names_of_their_own(path: Path) -> None:
    names = [str(layout) for layout in request_of(path).layouts()]
    assert len(names) >= 24
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("num_experts", [4, 8])
def test_the_default_grid_reaches_every_axis_alone_and_in_company(num_experts: int) -> None:
    model = replace(BIG, moe=replace(BIG.moe, num_experts=num_experts))
    tried = [layout.parallel for layout in layouts_of("default", model, None)]
    for axis in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data"):
        others = [{name: size for name, size in _axes(p).items() if name != axis} for p in tried if _axes(p)[axis] > 1]
        assert others, axis
        assert any(set(sizes.values()) != {1} for sizes in others), axis
    assert {p.zero for p in tried} == {0, 1, 2}
    assert any(p.expert > 1 and p.expert <= p.tensor for p in tried), "experts over tensor ranks"
    assert any(p.expert > 1 and p.tensor == p.context == 1 for p in tried), "experts over data ranks"
    assert any(p.expert > p.tensor > 1 and p.data > 1 for p in tried), "experts over tensor and data ranks"


def _axes(p: ParallelConfig) -> dict[str, int]:
    return {
        "tensor": p.tensor,
        "pipeline": p.pipeline,
        "virtual_pipeline": p.virtual_pipeline,
        "context": p.context,
        "expert": p.expert,
        "data": p.data,
    }


@pytest.mark.parametrize("planted", BREAK_NAMES)
@pytest.mark.parametrize("grid", GRID_NAMES)
def test_every_planted_bug_can_show_on_two_layouts_of_either_grid(planted: str, grid: str) -> None:
    assert len(Request(model=BIG, switches=Switches(), own=None, grid=grid, planted=planted).layouts()) >= 2


POWERS = st.sampled_from([1, 2, 4, 8, 16])


@given(
    tensor=POWERS,
    pipeline=POWERS,
    virtual=POWERS,
    context=POWERS,
    data=POWERS,
    share=POWERS,
    zero=st.sampled_from([0, 1, 2]),
)
def test_any_layout_shrinks_to_one_of_eight_ranks_that_can_run(
    tensor: int, pipeline: int, virtual: int, context: int, data: int, share: int, zero: int
) -> None:
    own = ParallelConfig(
        tensor=tensor,
        sequence=tensor > 1,
        pipeline=pipeline,
        virtual_pipeline=virtual if pipeline > 1 else 1,
        context=context,
        data=data,
        expert=min(share, tensor * context * data),
        zero=1 if zero == 2 and pipeline > 1 else zero,
    )
    shrunk = shrink_layout(own)
    Request(model=BIG, switches=Switches(), own=own).twin(shrunk)  # fails on a problem
    assert shrunk.num_ranks <= MOST_RANKS
    for axis in ("tensor", "pipeline", "context"):
        assert (_axes(shrunk.parallel)[axis] > 1) == (_axes(own)[axis] > 1), axis
    assert (shrunk.parallel.zero, shrunk.parallel.sequence) == (own.zero, own.sequence)


def test_the_users_own_layout_comes_first_and_only_once() -> None:
    own = ParallelConfig(tensor=8, sequence=True, expert=8, zero=1)
    layouts = layouts_of("default", BIG, own)
    assert str(layouts[0]) == "own: TP2+SP EP2(TP) zero1"
    assert "TP2+SP EP2(TP) zero1" not in [str(layout) for layout in layouts[1:]]


def test_a_twin_differs_from_the_model_in_sizes_only() -> None:
    shrunk = shrink(BIG, num_layers=4)
    sizes = {
        "vocab_size", "hidden", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions", "moe",
        "attention_temperature_positions", "embedding_multiplier", "init_std",
    }  # fmt: skip
    kept = [name for name in ModelConfig.__dataclass_fields__ if name not in sizes]
    assert {name: _value(shrunk, name) for name in kept} == {name: _value(BIG, name) for name in kept}
    moe_sizes = {"num_experts", "ffn_hidden", "residual_ffn_hidden"}
    moe_kept = [name for name in type(BIG.moe).__dataclass_fields__ if name not in moe_sizes]
    assert {name: _value(shrunk.moe, name) for name in moe_kept} == {name: _value(BIG.moe, name) for name in moe_kept}
    assert shrunk.num_heads // shrunk.num_kv_heads == BIG.num_heads // BIG.num_kv_heads
    assert shrunk.attention_temperature_positions is not None
    assert shrunk.moe.residual_ffn_hidden is not None


def _value(section: object, name: str) -> object:
    return object.__getattribute__(section, name)


@pytest.mark.parametrize(("has", "gets", "top_k"), [(2, 4, 2), (4, 4, 4), (6, 4, 4), (8, 8, 6), (64, 8, 6)])
def test_a_twin_has_four_or_eight_experts_and_at_most_as_many_choices(has: int, gets: int, top_k: int) -> None:
    model = replace(BIG, moe=replace(BIG.moe, num_experts=has, top_k=min(6, has)))
    assert num_twin_experts(model) == gets
    assert shrink(model, 4).moe.top_k == top_k


def test_the_data_ranks_of_a_twin_share_out_the_batch_and_count_unequal_numbers_of_tokens() -> None:
    run = Request(model=BIG, switches=Switches(), own=None).twin(Layout(ParallelConfig(data=2)))
    whole = twin_batch(run, step=0)
    parts = [twin_batch(run, 0, rank, 2) for rank in range(2)]
    rows = sorted(row.tolist() for part in parts for row in part.tokens_MBS.flatten(0, 1))
    assert rows == sorted(whole.tokens_MBS.flatten(0, 1).tolist())
    assert parts[0].num_tokens + parts[1].num_tokens == whole.num_tokens
    assert parts[0].num_tokens != parts[1].num_tokens
