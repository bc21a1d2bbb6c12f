"""The same operations as other libraries have them; the only file of this room that imports them, and each only when it
is made.

A layer here is given our first values in its own layout, so that it computes what ours does. What a peer needs, and
what it does more or less of than ours, is known without importing it: one that is not installed is a row that says so.
"""

# T tokens, D hidden, E experts, K top-k, F expert width, R = T * K rows, s positions, b micro-batch, h query heads,
# g kv heads, c head width, v vocabulary

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagrok.kernels.layer_case import Layer, LayerValues, MakeLayer

Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
"""q [b, h, s, c], k and v [b, g, s, c], cap of the scores -> [b, h, s, c]; causal."""
Entropy = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""hidden [T, D], weight [v, D], labels [T], multiplier, cap of the logits -> the sum of the losses."""

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Peer(Generic[Made]):
    """Someone else's way to do an operation."""

    libraries: tuple[str, ...]
    needs_gpu: bool
    differs: str
    """From ours, in words for the page."""
    make: Made

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot take part here; None if it can."""
        missing = [name for name in self.libraries if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.needs_gpu and device.type != "cuda":
            return f"needs an NVIDIA GPU; the device is {device.type}"
        return None


class _Expert(nn.Module):
    """One expert as DeepSpeed's stock layer wants it: a module."""

    def __init__(self, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up_FD), nn.Parameter(down_DF)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.gelu(gate, approximate="tanh") * up, self.down)


def _deepspeed_stock(values: LayerValues) -> Layer:
    _one_rank(values.x_TD.device)
    from deepspeed.moe.layer import MoE

    shape = values.shape
    layer = MoE(
        shape.hidden,
        nn.Module(),
        num_experts=shape.num_experts,
        k=shape.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    # Its constructor copies one expert; here each has its own first values.
    experts = [_Expert(*weights) for weights in zip(values.gate_up_EFD, values.down_EDF, strict=True)]
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(experts)
    layer.to(values.x_TD.device)
    layer.deepspeed_moe.gate.wg.weight.data = values.router_ED.clone().float()
    layer.set_deepspeed_parallelism()
    return Layer(list(layer.parameters()), lambda x_TD: layer(x_TD[None])[0][0])


def _deepspeed_auto_ep(values: LayerValues) -> Layer:
    _one_rank(values.x_TD.device)
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

    shape = values.shape
    spec = MoELayerSpec(
        moe_module_name="layer",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.width,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
        expert_activation="geglu_tanh",
    )
    config = AutoEPConfig(enabled=True, autoep_size=1, preset_model="mixtral", load_balance_coeff=None)
    layer = AutoEPMoELayer(spec, _mixtral_block(values), ep_size=1, ep_rank=0, config=config)
    layer.to(values.x_TD.device)
    return Layer(list(layer.parameters()), lambda x_TD: layer(x_TD[None])[0])


def _mixtral(values: LayerValues) -> Layer:
    block = _mixtral_block(values)
    return Layer(list(block.parameters()), lambda x_TD: block(x_TD[None])[0])


def _mixtral_block(values: LayerValues) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = values.shape
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="gelu_pytorch_tanh",
    )
    # As its models have it by default where torch can.
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(values.router_ED.clone())
    block.experts.gate_up_proj = nn.Parameter(values.gate_up_EFD.clone())
    block.experts.down_proj = nn.Parameter(values.down_EDF.clone())
    return block


def _megatron(values: LayerValues) -> Layer:
    _one_rank(values.x_TD.device)
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape, dtype, device = values.shape, values.x_TD.dtype, values.x_TD.device
    # Grouped experts need Transformer Engine or CUTLASS, and the alltoall dispatcher CUDA streams.
    has_engine = device.type == "cuda" and find_spec("transformer_engine") is not None
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        num_moe_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.width,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall" if device.type == "cuda" else "allgather",
        moe_grouped_gemm=has_engine,
        gated_linear_unit=True,
        activation_func=_gelu_tanh,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
    )
    spec = get_moe_module_spec(use_te=has_engine, num_experts=shape.num_experts, moe_grouped_gemm=has_engine)
    members = ProcessGroupCollection.use_mpu_process_groups()
    layer = MoELayer(config, spec.submodules, 1, members).to(device)
    _fill_megatron(layer, values, is_grouped=has_engine)
    return Layer(list(layer.parameters()), lambda x_TD: layer(x_TD[:, None])[0][:, 0])


def _fill_megatron(layer: Any, values: LayerValues, *, is_grouped: bool) -> None:
    """Our first values into its modules."""
    layer.router.weight.data.copy_(values.router_ED)
    for expert in range(values.shape.num_experts):
        if is_grouped:
            named = dict(layer.experts.named_parameters())
            fc1, fc2 = named[f"linear_fc1.weight{expert}"], named[f"linear_fc2.weight{expert}"]
        else:
            local = layer.experts.local_experts[expert]
            fc1, fc2 = local.linear_fc1.weight, local.linear_fc2.weight
        fc1.data.copy_(values.gate_up_EFD[expert])
        fc2.data.copy_(values.down_EDF[expert])


def _transformer_engine(values: LayerValues) -> Layer:
    from transformer_engine.pytorch import GroupedLinear

    shape, dtype, device = values.shape, values.x_TD.dtype, values.x_TD.device
    linears = [
        GroupedLinear(shape.num_experts, inner, outer, bias=False, params_dtype=dtype, device=device)
        for inner, outer in ((shape.hidden, 2 * shape.width), (shape.width, shape.hidden))
    ]
    for linear, weights in zip(linears, (values.gate_up_EFD, values.down_EDF), strict=True):
        for expert, parameter in enumerate(linear.parameters()):
            parameter.data.copy_(weights[expert])
    router_ED = nn.Parameter(values.router_ED.clone())

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = torch.softmax(F.linear(x_TD, router_ED).float(), -1).topk(shape.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        order_R = experts_TK.flatten().argsort(stable=True)
        splits = experts_TK.flatten().bincount(minlength=shape.num_experts).tolist()
        token_R = order_R // shape.top_k
        gate, up = linears[0](x_TD[token_R], splits).chunk(2, dim=-1)
        y_RD = linears[1](F.gelu(gate, approximate="tanh") * up, splits)
        y_RD = y_RD * weights_TK.flatten()[order_R, None].to(y_RD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_R, y_RD)

    return Layer([router_ED, *linears[0].parameters(), *linears[1].parameters()], forward)


def _sonic(values: LayerValues) -> Layer:
    from sonicmoe import KernelBackendMoE, MoE
    from sonicmoe.enums import ActivationType

    shape = values.shape
    layer = MoE(
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        activation_function=ActivationType.GEGLU,
        add_bias=False,
        std=0.02,
    ).to(device=values.x_TD.device, dtype=values.x_TD.dtype)
    layer.router.weight.data.copy_(values.router_ED)
    # Gate and up rows take turns.
    turns_EFD = torch.stack(values.gate_up_EFD.chunk(2, dim=1), dim=2).flatten(1, 2)
    layer.c_fc.weight.data.copy_(turns_EFD)
    layer.c_proj.weight.data.copy_(values.down_EDF)
    parameters = list(layer.parameters())
    return Layer(parameters, lambda x_TD: layer(x_TD, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0])


LAYERS: dict[str, Peer[MakeLayer]] = {
    "DeepSpeed MoE": Peer(
        ("deepspeed",),
        False,
        "`deepspeed.moe.layer.MoE`, `drop_tokens=False`, no random second expert: every expert is padded to the "
        "fullest; it computes its balance loss too",
        _deepspeed_stock,
    ),
    "DeepSpeed AutoEP": Peer(
        ("deepspeed", "transformers"),
        False,
        "`AutoEPMoELayer` on one expert rank, made from a Mixtral block; grouped matmuls by `torch._grouped_mm`, gate "
        "and up as two",
        _deepspeed_auto_ep,
    ),
    "megatron-core MoELayer": Peer(
        ("megatron",),
        False,
        "on a CPU `SequentialMLP` behind the allgather dispatcher (alltoall needs CUDA streams); on a GPU alltoall, "
        "with Transformer Engine's grouped experts where that is installed",
        _megatron,
    ),
    "HF Mixtral": Peer(
        ("transformers",),
        False,
        "`MixtralSparseMoeBlock`, experts by `torch._grouped_mm`, its default where torch has it",
        _mixtral,
    ),
    "TE GroupedLinear": Peer(
        ("transformer_engine",),
        True,
        "two of Transformer Engine's `GroupedLinear`, torch's indexing around them",
        _transformer_engine,
    ),
    "SonicMoE": Peer(
        ("sonicmoe",),
        True,
        "its `MoE` module with GEGLU; it computes its balance loss too",
        _sonic,
    ),
}


def _flash_attention(q_bhsc: Tensor, k_bgsc: Tensor, v_bgsc: Tensor, cap: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (q_bhsc, k_bgsc, v_bgsc))
    mixed: Tensor = flash_attn_func(q, k, v, causal=True, softcap=cap or 0.0)
    return mixed.transpose(1, 2)


def _flex_attention(q_bhsc: Tensor, k_bgsc: Tensor, v_bgsc: Tensor, cap: float | None) -> Tensor:
    mixed: Tensor = _compiled_flex(q_bhsc.shape[2], cap, q_bhsc.device)(q_bhsc, k_bgsc, v_bgsc)
    return mixed


@cache
def _compiled_flex(num_positions: int, cap: float | None, device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, num_positions, num_positions, device=device)

    def attend(q_bhsc: Tensor, k_bgsc: Tensor, v_bgsc: Tensor) -> Tensor:
        score = None if cap is None else capped
        mixed: Tensor = flex_attention(q_bhsc, k_bgsc, v_bgsc, score_mod=score, block_mask=mask, enable_gqa=True)
        return mixed

    return torch.compile(attend)


def _sdpa(q_bhsc: Tensor, k_bgsc: Tensor, v_bgsc: Tensor, cap: float | None) -> Tensor:
    assert cap is None
    return F.scaled_dot_product_attention(q_bhsc, k_bgsc, v_bgsc, is_causal=True, enable_gqa=True)


ATTENTIONS: dict[str, Peer[Attend]] = {
    "flash-attn": Peer(("flash_attn",), True, "`flash_attn_func(softcap=)`", _flash_attention),
    "FlexAttention": Peer(("torch",), True, "compiled, a block mask made beforehand", _flex_attention),
    "torch sdpa": Peer(("torch",), False, "`scaled_dot_product_attention`: has no cap", _sdpa),
}


def _liger(hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, multiplier: float, cap: float) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(softcap=cap, reduction="sum")(
        weight_vD, hidden_TD * multiplier, labels_T
    )
    return loss


ENTROPIES: dict[str, Peer[Entropy]] = {
    "Liger": Peer(
        ("liger_kernel",),
        True,
        "`LigerFusedLinearCrossEntropyLoss(softcap=)`; the multiplier is folded into hidden",
        _liger,
    ),
}


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@cache
def _one_rank(device: torch.device) -> None:
    """A world of this process alone, which DeepSpeed's and Megatron's layers ask for their groups."""
    from megatron.core.tensor_parallel import mappings, model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils, router
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, not in __all__

    from megagrok.parallel.groups import make_groups
    from megagrok.parallel.topology import Topology
    from megagrok.platform import CPU, find_platform

    platform = CPU if device.type == "cpu" else find_platform()
    if not dist.is_initialized():
        dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    topology = Topology()
    make_groups(topology, virtual_pipeline=1, platform=platform, timeout_seconds=600)
    if platform.is_cuda:
        model_parallel_cuda_manual_seed(5)
    else:
        # As in megagrok/bench/peers/megatron_gpt.py: two names that these modules look up and a CPU does not have.
        vars(router)["torch"] = vars(mappings)["torch"]
        vars(moe_utils)["te_general_gemm"] = None
