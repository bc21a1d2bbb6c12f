"""Parameter counts equal the published ones to the last parameter, and the tensors of a model one by one."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrok.config import ModelConfig, MoEConfig, load_model_config
from megagrok.plan import active_params, params_by_part, total_params

MODELS = Path(__file__).parents[2] / "configs" / "model"


@pytest.mark.parametrize(
    ("name", "overrides", "total", "active"),
    [
        ("grok1-314b", [], 315_684_820_992, 83_756_587_008),
        ("grok1-314b", ["model.tied_embeddings=false"], 316_490_127_360, 84_561_893_376),
        ("grok2-270b", [], 269_515_497_472, 114_896_674_816),
        ("grok2-286b", [], 285_621_624_832, 80_268_500_992),
    ],
)
def test_counts_are_those_of_the_published_models(name: str, overrides: list[str], total: int, active: int) -> None:
    model = load_model_config(MODELS / f"{name}.yaml", overrides)
    assert (total_params(model), active_params(model)) == (total, active)


@pytest.mark.parametrize(
    ("ffn_hidden", "tied", "total", "active"),
    [
        (21760, False, 285.62, 80.27),
        (21760, True, 284.55, 79.19),
        (21848, False, 286.73, 80.55),
        (22016, False, 288.84, 81.07),
    ],
)
def test_the_286b_family_has_its_sizes(ffn_hidden: int, tied: bool, total: float, active: float) -> None:
    overrides = [f"model.moe.ffn_hidden={ffn_hidden}", f"model.tied_embeddings={str(tied).lower()}"]
    model = load_model_config(MODELS / "grok2-286b.yaml", overrides)
    assert (round(total_params(model) / 1e9, 2), round(active_params(model) / 1e9, 2)) == (total, active)


def tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its published name, [out, in]."""
    d, vocab = model.hidden, model.vocab_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not model.tied_embeddings:
        found["lm_head.weight"] = (vocab, d)
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for n in range(model.num_layers):
        layer = f"model.layers.{n}"
        for norm in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            found[f"{layer}.{norm}.weight"] = (d,)
        found[f"{layer}.self_attn.q_proj.weight"] = (queries, d)
        found[f"{layer}.self_attn.k_proj.weight"] = (keys, d)
        found[f"{layer}.self_attn.v_proj.weight"] = (keys, d)
        found[f"{layer}.self_attn.o_proj.weight"] = (d, queries)
        found[f"{layer}.block_sparse_moe.gate.weight"] = (model.moe.num_experts, d)
        for e in range(model.moe.num_experts):
            for name in ("w1", "w3", "w2"):
                shape = (d, model.moe.ffn_hidden) if name == "w2" else (model.moe.ffn_hidden, d)
                found[f"{layer}.block_sparse_moe.experts.{e}.{name}.weight"] = shape
        if model.moe.residual_ffn_hidden is not None:
            width = model.moe.residual_ffn_hidden
            for name in ("gate_proj", "up_proj"):
                found[f"{layer}.mlp.{name}.weight"] = (width, d)
            found[f"{layer}.mlp.down_proj.weight"] = (d, width)
    return found


def is_idle(name: str, model: ModelConfig) -> bool:
    parts = name.split(".")
    return "experts" in parts and int(parts[parts.index("experts") + 1]) >= model.moe.top_k


SIZES = st.integers(1, 9)


@given(
    model=st.builds(
        ModelConfig,
        vocab_size=SIZES,
        hidden=SIZES,
        num_layers=SIZES,
        num_heads=SIZES,
        num_kv_heads=SIZES,
        head_dim=SIZES,
        max_positions=SIZES,
        tied_embeddings=st.booleans(),
        moe=st.builds(
            MoEConfig,
            num_experts=st.integers(3, 9),
            top_k=st.integers(1, 3),
            ffn_hidden=SIZES,
            residual_ffn_hidden=st.none() | SIZES,
        ),
    )
)
def test_counts_are_the_sum_over_the_tensors(model: ModelConfig) -> None:
    sizes = {name: math.prod(shape) for name, shape in tensors(model).items()}
    assert total_params(model) == sum(sizes.values())
    assert active_params(model) == sum(size for name, size in sizes.items() if not is_idle(name, model))
    assert params_by_part(model)["experts"] == sum(size for name, size in sizes.items() if ".experts." in name)
    assert params_by_part(model)["norms"] == sum(size for name, size in sizes.items() if "norm" in name)


def test_all_parameters_are_active_when_a_token_visits_every_expert() -> None:
    model = load_model_config(MODELS / "tiny.yaml")
    every = dataclasses.replace(model, moe=dataclasses.replace(model.moe, top_k=model.moe.num_experts))
    assert active_params(every) == total_params(every)
