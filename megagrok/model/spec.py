"""Grok as Megatron ModuleSpecs: which module stands in which slot of Megatron's TransformerLayer. Nothing is patched.

| slot of TransformerLayer | what stands there                                   |
|--------------------------|-----------------------------------------------------|
| input_layernorm          | RMSNorm (pre_attn_norm)                             |
| self_attention           | Megatron's SelfAttention around SoftcapAttention    |
| self_attn_bda            | PostNormResidual (post_attn_norm, dropout)          |
| pre_mlp_layernorm        | RMSNorm (pre_moe_norm)                              |
| mlp                      | GrokMoE                                             |
| mlp_bda                  | PostNormResidual (post_moe_norm, dropout)           |

The layer itself is GrokLayer, which tells the two residuals which tokens they add to.
"""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megagrok.model.attention import SoftcapAttention
from megagrok.model.moe.layer import GrokMoE
from megagrok.model.norm import PostNormResidual, RMSNorm
from megagrok.model.transformer_config import GrokTransformerConfig


class GrokLayer(TransformerLayer):
    """TransformerLayer that knows the numbers of its tokens, for dropout.

    They come in the place of `attention_mask`, which SoftcapAttention does not read: a block hands that argument to
    every layer, and recomputation keeps it and hands it over again. So a backward pass that recomputes an earlier
    micro-batch, of this chunk or another, asks for that micro-batch's masks, whatever ran in between.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn_bda.settle(self.layer_number - 1)
        self.mlp_bda.settle(self.layer_number - 1)

    def forward(self, *, attention_mask: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor | None]:
        """As TransformerLayer's. attention_mask: `dropout.token_numbers` of this rank's part of the residual stream,
        [s, b]; None where nothing is dropped."""
        self.self_attn_bda.expect(attention_mask)
        self.mlp_bda.expect(attention_mask)
        output: tuple[Tensor, Tensor | None] = super().forward(attention_mask=None, **rest)
        return output


def grok_layer_spec(config: GrokTransformerConfig) -> ModuleSpec:
    """One Grok layer."""
    column, row = _linear_modules(config)
    return ModuleSpec(
        module=GrokLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=SoftcapAttention, linear_proj=row),
            ),
            self_attn_bda=ModuleSpec(module=PostNormResidual, params={"config": config, "branch": 0}),
            pre_mlp_layernorm=RMSNorm,
            mlp=GrokMoE,
            mlp_bda=ModuleSpec(module=PostNormResidual, params={"config": config, "branch": 1}),
        ),
    )


def grok_block_spec(config: GrokTransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk, and the final norm where the model ends."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[grok_layer_spec(config)] * num_layers, layer_norm=RMSNorm)


def _linear_modules(config: GrokTransformerConfig) -> tuple[type, type]:
    """Megatron's own parallel linears, or Transformer Engine's where fp8 was asked for (and checked) before."""
    if config.fp8 is None:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
