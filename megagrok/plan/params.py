"""Parameters of a model, to the last one, from its configuration alone.

The names of the parts are those of `params_by_part`; total and active counts are their sums. Symbols: L layers, d
hidden, Hq and Hkv heads of width D, E experts of which a token visits K, f an inner width, V the vocabulary.
"""

from megagrok.config.schema import ModelConfig


def total_params(model: ModelConfig) -> int:
    """All parameters; a tied embedding counts once."""
    return sum(params_by_part(model).values())


def active_params(model: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts it does not visit. The whole embedding table counts."""
    idle_experts = model.moe.num_experts - model.moe.top_k
    return total_params(model) - model.num_layers * idle_experts * expert_params(model)


def params_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters of each kind over all layers; the parts add up to the whole."""
    return {
        "embedding": embedding_params(model),
        "attention": model.num_layers * attention_params(model),
        "router": model.num_layers * router_params(model),
        "experts": model.num_layers * model.moe.num_experts * expert_params(model),
        "residual_ffn": model.num_layers * residual_ffn_params(model),
        "norms": model.num_layers * layer_norm_params(model) + model.hidden,
        "output_head": 0 if model.tied_embeddings else embedding_params(model),
    }


def embedding_params(model: ModelConfig) -> int:
    """V d; the output head has as many."""
    return model.vocab_size * model.hidden


def attention_params(model: ModelConfig) -> int:
    """One layer's four projections: query and output 2 d Hq D, key and value 2 d Hkv D."""
    return 2 * model.hidden * (model.num_heads + model.num_kv_heads) * model.head_dim


def router_params(model: ModelConfig) -> int:
    """One layer's router, d E."""
    return model.hidden * model.moe.num_experts


def expert_params(model: ModelConfig) -> int:
    """One expert: gate, up and down, 3 d f."""
    return 3 * model.hidden * model.moe.ffn_hidden


def residual_ffn_params(model: ModelConfig) -> int:
    """One layer's dense MLP beside the experts, 3 d f; 0 if the model has none."""
    return 3 * model.hidden * (model.moe.residual_ffn_hidden or 0)


def layer_norm_params(model: ModelConfig) -> int:
    """One layer's four norms, before and after attention and experts."""
    return 4 * model.hidden
