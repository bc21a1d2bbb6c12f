"""The parameters of the architecture: every global name with its global shape. No torch, no ranks, no values.

The names are those of the published Grok-2 checkpoint, the shapes are torch's Linear order [out, in]. Whatever a
layout splits, stacks or fuses, the rest of megagrok (oracle, checkpoint, export, optimizer groups) speaks of these.
"""

from megagrok.config.schema import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_RESIDUAL_PROJECTIONS = (".o_proj.weight", ".w2.weight", ".down_proj.weight")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every global parameter name and its shape, in the order of the forward pass. Tied embeddings have no lm_head."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, model.hidden)}
    layer_shapes = _layer_shapes(model)
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    shapes[FINAL_NORM] = (model.hidden,)
    if not model.tied_embeddings:
        shapes[LM_HEAD] = (model.vocab_size, model.hidden)
    return shapes


def is_expert(name: str) -> bool:
    """True for the matrices of one expert, which expert parallelism deals out; the router's gate is not one."""
    return ".experts." in name


def is_norm(name: str) -> bool:
    """True for the gains of RMSNorm, the only vectors of the architecture."""
    return name.endswith("norm.weight")


def is_decayed(name: str) -> bool:
    """True for matrices that multiply activations; norm gains and the embedding table keep out of weight decay."""
    return not is_norm(name) and name != EMBEDDING


def is_residual_projection(name: str) -> bool:
    """True for matrices whose output is on its way back into the residual stream: o_proj, w2, down_proj."""
    return name.endswith(_RESIDUAL_PROJECTIONS)


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, moe = model.hidden, model.moe
    query_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "pre_attn_norm.weight": (hidden,),
        "self_attn.q_proj.weight": (query_width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, query_width),
        "post_attn_norm.weight": (hidden,),
        "pre_moe_norm.weight": (hidden,),
        "block_sparse_moe.gate.weight": (moe.num_experts, hidden),
    }
    for expert in range(moe.num_experts):
        shapes |= _gated_mlp_shapes(f"block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), hidden, moe.ffn_hidden)
    if moe.residual_ffn_hidden is not None:
        shapes |= _gated_mlp_shapes("mlp", ("gate_proj", "up_proj", "down_proj"), hidden, moe.residual_ffn_hidden)
    shapes["post_moe_norm.weight"] = (hidden,)
    return shapes


def _gated_mlp_shapes(
    prefix: str, gate_up_down: tuple[str, str, str], hidden: int, ffn_hidden: int
) -> dict[str, tuple[int, ...]]:
    gate, up, down = gate_up_down
    return {
        f"{prefix}.{gate}.weight": (ffn_hidden, hidden),
        f"{prefix}.{up}.weight": (ffn_hidden, hidden),
        f"{prefix}.{down}.weight": (hidden, ffn_hidden),
    }
