"""Our settings in Megatron's words: one pure translation, every field that matters written out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megagrok.config.schema import ModelConfig, RunConfig
from megagrok.kernels.chosen import Kernels, choose_kernels
from megagrok.parallel.groups import ProcessGroups
from megagrok.platform import Platform


@dataclass(kw_only=True)
class GrokTransformerConfig(TransformerConfig):
    """Megatron's configuration plus what only Grok's modules read. It reaches every module of a spec."""

    grok: ModelConfig
    groups: ProcessGroups
    kernels: Kernels
    dropout_seed: int


def gelu_tanh(x: Tensor) -> Tensor:
    """Grok's GELU, the tanh form."""
    return F.gelu(x, approximate="tanh")


def make_transformer_config(run: RunConfig, groups: ProcessGroups, platform: Platform) -> GrokTransformerConfig:
    """Translate a run's settings. Pure but for reading the groups it is given; every rank gets its own copy."""
    model, parallel = run.model, run.parallel
    has_stages = parallel.pipeline > 1
    return GrokTransformerConfig(
        grok=model,
        groups=groups,
        kernels=choose_kernels(run.kernels, platform.device),
        dropout_seed=run.train.seed,
        # Architecture
        num_layers=model.num_layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.moe.residual_ffn_hidden or model.moe.ffn_hidden,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=gelu_tanh,
        add_bias_linear=False,
        # Grok's own dropout is in PostNormResidual; this one would need random state.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Makes the schedules hand the loss scale to MoEAuxLossAutoScaler; the experts themselves are DeepSpeed's.
        num_moe_experts=model.moe.num_experts,
        moe_router_topk=model.moe.top_k,
        # Grok's order, and the only one that Megatron accepts with one expert a token.
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=model.moe.ffn_hidden,
        # Layout
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        # Numbers
        params_dtype=torch.float32 if run.train.precision == "fp32" else torch.bfloat16,
        pipeline_dtype=(torch.float32 if run.train.precision == "fp32" else torch.bfloat16) if has_stages else None,
        bf16=run.train.precision != "fp32",
        fp8="hybrid" if run.train.precision == "fp8" else None,
        fp8_recipe="tensorwise",
        deterministic_mode=run.train.deterministic,
        # The loss is a sum over tokens: the schedules must not divide it.
        calculate_per_token_loss=True,
        # megagrok fills every parameter itself, by name and seed.
        perform_initialization=False,
        use_cpu_initialization=not platform.is_cuda,
        # Interleaving with two stages and batched p2p is silently wrong on gloo: previous and next stage are one peer
        # and untagged messages pair in posting order (megatron-core 0.16.1 p2p_communication.py:15). Separate groups
        # per direction are exact, so they are used wherever there is interleaving.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        batch_p2p_sync=platform.is_cuda,
        # Memory
        recompute_granularity=None if run.train.recompute == "none" else run.train.recompute,
        recompute_method="uniform" if run.train.recompute == "full" else None,
        recompute_num_layers=1 if run.train.recompute == "full" else None,
        recompute_modules=["core_attn"] if run.train.recompute == "selective" else [],
        # Freed while a send is still reading it, on gloo: its isend has no stream to order the two.
        deallocate_pipeline_outputs=platform.backend != "gloo",
        # Fused kernels of apex and Transformer Engine, which a CPU does not have and Grok's modules do not call.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
