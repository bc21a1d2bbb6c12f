"""Floating-point operations of the model per token, in one named convention, and the share of the peak they make.

Model FLOPs, not hardware FLOPs: what the mathematics needs. Recomputed activations, padding and masked halves of the
attention square do not count, so recomputing more never raises the MFU.
"""

from megagrok.config.schema import ModelConfig
from megagrok.plan.params import attention_params, embedding_params, expert_params, residual_ffn_params, router_params

CONVENTION = (
    "model FLOPs: 2 per weight of each matmul a token meets (attention projections, router, its top_k experts, residual"
    " MLP, output head), attention scores and values over the causal half, times 3 for training, no recomputation"
)

# The backward pass has two matmuls, for the input and for the weight, for each one of the forward pass.
FORWARD_PASSES_PER_STEP = 3


def training_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Forward and backward pass of one token in sequences of `seq_len`; see CONVENTION."""
    return FORWARD_PASSES_PER_STEP * forward_flops_per_token(model, seq_len)


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Forward pass of one token, averaged over the positions of a sequence of `seq_len`."""
    return 2 * matmul_params_per_token(model) + attention_flops_per_token(model, seq_len)


def matmul_params_per_token(model: ModelConfig) -> int:
    """Weights that one token is multiplied with. The embedding is a look-up; the output head counts, tied or not."""
    layer = (
        attention_params(model)
        + router_params(model)
        + model.moe.top_k * expert_params(model)
        + residual_ffn_params(model)
    )
    return model.num_layers * layer + embedding_params(model)


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Scores and weighted values of all layers: 2 matmuls x 2 FLOPs x (seq_len / 2 keys on average) x Hq D."""
    return model.num_layers * 2 * seq_len * model.num_heads * model.head_dim


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float) -> float:
    """Model FLOPs utilisation: the share of the peak of all devices together that went into the model."""
    return tokens_per_second * flops_per_token / peak_flops_per_second
