"""Contender: Megatron-core's own GPTModel with its own MoELayer, DotProductAttention and pipeline schedule.

Same translation of the settings as megagrok's model, so the same sizes and layout. What it does less of than Grok: no
soft-caps, no norms after the sub-blocks. What stands in for parts that need a GPU or apex: torch's RMSNorm (Megatron's
wrapper of it refuses sequence parallelism), the optimizer (torch's fused AdamW around one all-reduce for the norm, less
work than either library's own), and three names that its modules look up (see `_meet_the_cpu`).
"""

# M micro-batches of this data rank, B micro-batch, S sequence

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils, router
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn

from megagrok.bench.peers.contender import count_parameters, not_finite
from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.gradients import global_norm, sum_over_tensor_ranks
from megagrok.model.parts import LocalParameter
from megagrok.model.transformer_config import GrokTransformerConfig, make_transformer_config
from megagrok.parallel.groups import ProcessGroups
from megagrok.platform import Platform


class MegatronStep:
    """Megatron's model through Megatron's schedule, AdamW on every rank's own parameters."""

    name = "megatron-core GPTModel"

    def __init__(self, run: RunConfig, groups: ProcessGroups, platform: Platform) -> None:
        _meet_the_cpu(platform)
        self._run, self._groups = run, groups
        self._config = _own_moe_config(run, groups, platform)
        # Megatron draws first values from torch's generator; equal seeds make the tensor ranks' copies equal.
        torch.manual_seed(run.train.seed)
        self._chunk = _build(self._config, run, groups).to(platform.device)
        self._parameters = [_placed(parameter) for parameter in self._chunk.parameters()]
        self.num_params = count_parameters(self._parameters, groups)
        self._adamw = _make_adamw(self._parameters, run)

    def step(self, batch: Batch, lr: float) -> float:
        """See Contender."""
        num_tokens = batch.labels_MBS.numel() * self._groups.topology.data
        self._config.grad_scale_func = lambda loss: loss / num_tokens
        loss = self._forward_backward(batch) / num_tokens
        self._reduce_gradients()
        norm = float(global_norm(self._parameters, self._groups, _gradient_of))
        if not norm < float("inf"):
            raise not_finite(self.name)
        if 0 < self._run.optimizer.clip_norm < norm:
            coefficient = self._run.optimizer.clip_norm / norm
            torch._foreach_mul_([_gradient_of(item.parameter) for item in self._parameters], coefficient)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        return loss

    def _forward_backward(self, batch: Batch) -> float:
        """Sum of the loss over the step's tokens, on every rank."""
        num_micro_batches, micro_batch, seq_len = batch.tokens_MBS.shape
        is_later_SS = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).triu(1)
        positions_BS = torch.arange(seq_len).expand(micro_batch, seq_len)

        def forward_step(micro_batches: Iterator[tuple[Tensor, Tensor]], chunk: GPTModel):  # type: ignore[no-untyped-def]
            tokens_BS, labels_BS = next(micro_batches)
            return chunk(tokens_BS, positions_BS, is_later_SS, labels=labels_BS), _sum_losses

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(list(zip(batch.tokens_MBS, batch.labels_MBS, strict=True))),
            model=self._chunk,
            num_microbatches=num_micro_batches,
            seq_length=seq_len,
            micro_batch_size=micro_batch,
            forward_only=False,
        )
        has_loss = self._groups.is_last_stage and self._groups.coordinates.tensor == 0
        total = torch.stack(losses).double().sum() if has_loss else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _reduce_gradients(self) -> None:
        sum_over_tensor_ranks(self._parameters, self._groups, _gradient_of)
        for item in self._parameters:
            group = self._groups.expert_data if item.is_expert else self._groups.data
            if dist.get_world_size(group) > 1:
                dist.all_reduce(_gradient_of(item.parameter), group=group)


def _meet_the_cpu(platform: Platform) -> None:
    """Three names that Megatron's modules look up and a CPU does not have (megatron-core 0.16.1).

    The view of torch whose current device is the CPU is the one that megagrok's own seam gave to `mappings`.
    """
    if not platform.is_cuda:
        for module in (router, rotary_pos_embedding):  # router.py:90, rotary_pos_embedding.py:162
            vars(module)["torch"] = vars(mappings)["torch"]
        vars(moe_utils)["te_general_gemm"] = None  # moe_utils.py:1169 reads it; only Transformer Engine defines it


def _own_moe_config(run: RunConfig, groups: ProcessGroups, platform: Platform) -> GrokTransformerConfig:
    """megagrok's translation plus the settings that Megatron's own MoE layer reads."""
    moe = run.model.moe
    settings: dict[str, Any] = {
        "perform_initialization": True,
        "moe_token_dispatcher_type": "allgather",  # alltoall waits on CUDA streams
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none" if moe.balance_loss == "none" else "aux_loss",
        "moe_aux_loss_coeff": moe.balance_coefficient,
        "moe_z_loss_coeff": moe.z_loss_coefficient,
    }
    return replace(make_transformer_config(run, groups, platform), **settings)


def _build(config: GrokTransformerConfig, run: RunConfig, groups: ProcessGroups) -> GPTModel:
    layer = get_gpt_layer_local_spec(num_experts=run.model.moe.num_experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = _Norm
    layer.submodules.pre_mlp_layernorm = _Norm
    layers = [layer] * get_num_layers_to_build(config)
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=_Norm),
        vocab_size=run.model.vocab_size,
        max_sequence_length=run.train.seq_len,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(run.model.rope_theta),
    )


class _Norm(nn.RMSNorm):
    """torch's, tagged as Megatron's own norms are: under sequence parallelism its gradient is a part of the whole."""

    def __init__(self, config: GrokTransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _placed(parameter: nn.Parameter) -> LocalParameter:
    """Where a parameter of Megatron's lives, read from the tags that Megatron gives it."""
    tags = vars(parameter)
    is_expert = not tags.get("allreduce", True)
    is_split = is_expert or tags.get("tensor_model_parallel", False)
    return LocalParameter(parameter, (), is_expert=is_expert, is_replicated_over_tensor=not is_split)


def _make_adamw(parameters: list[LocalParameter], run: RunConfig) -> torch.optim.AdamW:
    decayed = [item.parameter for item in parameters if item.parameter.dim() > 1]
    kept = [item.parameter for item in parameters if item.parameter.dim() <= 1]
    optimizer = run.optimizer
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optimizer.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sum_losses(losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss function: the sum, a token count it does not use, and a copy to report (it scales the first)."""
    loss_sum = losses_BS.sum()
    return loss_sum, torch.zeros((), dtype=torch.int), loss_sum.detach().clone()
