"""Floating-point operations of the model per token, in one named convention, and the share of the peak they make.

Model FLOPs, not hardware FLOPs: what the mathematics needs. Recomputed activations, padding and masked halves of the
attention square do not count, so recomputing more never raises the MFU.
"""

from megagrok.config.schema import ModelConfig, Recompute
from megagrok.plan.shape import Shape

CONVENTION = (
    "model FLOPs: 2 per weight of each matmul a token meets (attention projections, router, its top_k experts, residual"
    " MLP, output head), attention scores and values over the causal half, times 3 for training, no recomputation"
)

# The backward pass has two matmuls, for the input and for the weight, for each one of the forward pass.
FORWARD_PASSES_PER_STEP = 3


def training_flops_per_token(model: ModelConfig | Shape, seq_len: int) -> int:
    """Forward and backward pass of one token in sequences of `seq_len`; see CONVENTION."""
    return FORWARD_PASSES_PER_STEP * forward_flops_per_token(model, seq_len)


def forward_flops_per_token(model: ModelConfig | Shape, seq_len: int) -> int:
    """Forward pass of one token, averaged over the positions of a sequence of `seq_len`."""
    return 2 * matmul_params_per_token(model) + attention_flops_per_token(model, seq_len)


def matmul_params_per_token(model: ModelConfig | Shape) -> int:
    """Weights that one token is multiplied with. The embedding is a look-up; the output head counts, tied or not."""
    shape = _shape(model)
    moe = shape.layers - shape.dense_layers if shape.experts else 0
    width = moe * (shape.top_k * shape.expert_ffn + shape.shared_ffn) + (shape.layers - moe) * shape.dense_ffn
    return (
        shape.layers * shape.attention_params
        + moe * shape.hidden * shape.experts
        + shape.ffn_matrices * shape.hidden * width
        + shape.vocab * shape.hidden
    )


def attention_flops_per_token(model: ModelConfig | Shape, seq_len: int) -> int:
    """Scores and weighted values of all layers: 2 matmuls x 2 FLOPs x (seq_len / 2 keys on average) x Hq D."""
    shape = _shape(model)
    return shape.layers * 2 * seq_len * shape.heads * shape.head_dim


def recomputed_flops_per_token(model: ModelConfig | Shape, seq_len: int, recompute: Recompute) -> int:
    """What the backward pass of one token computes again: nothing, the attention core, or the layers without the head.
    Hardware FLOPs are those of training and these together."""
    if recompute == "none":
        return 0
    attention = attention_flops_per_token(model, seq_len)
    if recompute == "selective":
        return attention
    return 2 * (matmul_params_per_token(model) - _head_params(model)) + attention


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float) -> float:
    """Model FLOPs utilisation: the share of the peak of all devices together that went into the model."""
    return tokens_per_second * flops_per_token / peak_flops_per_second


def _shape(model: ModelConfig | Shape) -> Shape:
    return model if isinstance(model, Shape) else Shape.of(model)


def _head_params(model: ModelConfig | Shape) -> int:
    shape = _shape(model)
    return shape.vocab * shape.hidden
