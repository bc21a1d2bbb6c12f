"""Laws of the parameter names: complete, published, countable."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megagrok.config.schema import ModelConfig, MoEConfig
from megagrok.model.names import is_decayed, is_expert, is_norm, is_residual_projection, parameter_shapes

GROK2_286B = ModelConfig(
    vocab_size=131072,
    hidden=8192,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_positions=8192,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=21760),
)
GROK2 = replace(GROK2_286B, moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=16384, residual_ffn_hidden=32768))
GROK1 = replace(
    GROK2_286B,
    hidden=6144,
    num_heads=48,
    tied_embeddings=True,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=32768),
)
MODELS = {"286b": GROK2_286B, "grok2": GROK2, "grok1": GROK1}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # The published files hold this many: 539 GB in bf16 (grok2); 64 layers of 4.92 B and a tied embedding (grok1).
        pytest.param(GROK2, 269_515_497_472, id="grok2"),
        pytest.param(GROK1, 315_684_820_992, id="grok1"),
        pytest.param(GROK2_286B, 285_621_624_832, id="286b"),
    ],
)
def test_the_shapes_add_up_to_the_published_size(model: ModelConfig, expected: int) -> None:
    assert count(parameter_shapes(model)) == expected


def test_grok2_has_the_published_tensors() -> None:
    shapes = parameter_shapes(GROK2)
    published = {
        "model.embed_tokens.weight": (131072, 8192),
        "lm_head.weight": (131072, 8192),
        "model.norm.weight": (8192,),
        "self_attn.q_proj.weight": (8192, 8192),
        "self_attn.k_proj.weight": (1024, 8192),
        "self_attn.v_proj.weight": (1024, 8192),
        "self_attn.o_proj.weight": (8192, 8192),
        "block_sparse_moe.gate.weight": (8, 8192),
        "block_sparse_moe.experts.7.w1.weight": (16384, 8192),
        "block_sparse_moe.experts.7.w3.weight": (16384, 8192),
        "block_sparse_moe.experts.7.w2.weight": (8192, 16384),
        "mlp.gate_proj.weight": (32768, 8192),
        "mlp.up_proj.weight": (32768, 8192),
        "mlp.down_proj.weight": (8192, 32768),
        "pre_attn_norm.weight": (8192,),
        "post_attn_norm.weight": (8192,),
        "pre_moe_norm.weight": (8192,),
        "post_moe_norm.weight": (8192,),
    }
    for name, shape in published.items():
        full_names = [name] if name in shapes else [f"model.layers.{layer}.{name}" for layer in range(64)]
        assert [shapes[full_name] for full_name in full_names] == [shape] * len(full_names)
    # 4 attention matrices, 4 norms, 1 gate, 3 dense and 8 x 3 expert matrices a layer; embedding, head, final norm.
    assert len(shapes) == 64 * (4 + 4 + 1 + 3 + 8 * 3) + 3


def test_tied_models_have_no_head_and_models_without_the_residual_mlp_no_mlp() -> None:
    assert "lm_head.weight" not in parameter_shapes(GROK1)
    assert not any(".mlp." in name for name in parameter_shapes(GROK1))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_kinds_of_parameters_partition_the_model_as_documented(model: ModelConfig) -> None:
    shapes = parameter_shapes(model)
    layers, experts, is_residual = model.num_layers, model.moe.num_experts, model.moe.residual_ffn_hidden is not None
    assert {name for name, shape in shapes.items() if len(shape) == 1} == {name for name in shapes if is_norm(name)}
    assert {name for name in shapes if not is_decayed(name)} == {
        name for name in shapes if is_norm(name) or name == "model.embed_tokens.weight"
    }
    assert sum(map(is_expert, shapes)) == layers * experts * 3
    assert not any(is_expert(name) for name in shapes if "gate.weight" in name or ".mlp." in name)
    assert sum(map(is_residual_projection, shapes)) == layers * (1 + experts + is_residual)
    # What goes back into the stream has the stream's width in front.
    assert all(shape[0] == model.hidden for name, shape in shapes.items() if is_residual_projection(name))


def test_the_names_need_no_torch() -> None:
    code = "import sys, megagrok.model.names; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
