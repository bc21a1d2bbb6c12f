"""Contenders: Hugging Face's Mixtral of the same shape, under torch's DDP and under DeepSpeed's AutoEP.

Both are data-parallel only, as their users have them: DDP keeps every expert on every rank, AutoEP replaces the expert
layers by its own, spread over the expert ranks. Mixtral has no soft-caps and half of Grok's norms, so it does less; the
rest is the same: sizes, gated tanh-GELU experts, top-k with renormalized weights, balance loss under DDP.
"""

# M micro-batches of this data rank, B micro-batch, S sequence

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import output_capturing

from megagrok.bench.peers.contender import not_finite
from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.parallel.groups import ProcessGroups
from megagrok.platform import Platform


class MixtralDdpStep:
    """Gradients of all experts are summed over all ranks, by DDP's buckets, while the backward pass runs."""

    name = "HF Mixtral + DDP"

    def __init__(self, run: RunConfig, groups: ProcessGroups, platform: Platform) -> None:
        self._run, self._groups, self._platform = run, groups, platform
        model = _mixtral(run, with_balance_loss=run.model.moe.balance_loss != "none").to(platform.device)
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self._model = DistributedDataParallel(model, process_group=groups.data)
        self._adamw = _adamw(model, run)

    def step(self, batch: Batch, lr: float) -> float:
        """See Contender."""
        num_micro_batches, coefficient = len(batch.tokens_MBS), self._run.model.moe.balance_coefficient
        mean = 0.0
        for number, (tokens_BS, labels_BS) in enumerate(zip(batch.tokens_MBS, batch.labels_MBS, strict=True), start=1):
            with nullcontext() if number == num_micro_batches else self._model.no_sync():
                loss, cross_entropy = _losses(self._model, tokens_BS, labels_BS, self._platform, coefficient)
                (loss / num_micro_batches).backward()
            mean += cross_entropy / num_micro_batches
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._run.optimizer.clip_norm or float("inf"))
        if not norm.isfinite():
            raise not_finite(self.name)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        return _mean_over(mean, self._groups)


class MixtralAutoEpStep:
    """DeepSpeed's engine around the same model, its expert layers spread over the expert ranks by AutoEP."""

    name = "DeepSpeed AutoEP on HF Mixtral"

    def __init__(self, run: RunConfig, groups: ProcessGroups, platform: Platform) -> None:
        self._groups, self._platform = groups, platform
        model = _mixtral(run, with_balance_loss=False)
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        with _old_output_registry():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=model.parameters(),
                config=_deepspeed_config(run),
                dist_init_required=False,
            )

    def step(self, batch: Batch, lr: float) -> float:
        """See Contender."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        mean = 0.0
        for tokens_BS, labels_BS in zip(batch.tokens_MBS, batch.labels_MBS, strict=True):
            loss, cross_entropy = _losses(self._engine, tokens_BS, labels_BS, self._platform, 0.0)
            self._engine.backward(loss)
            self._engine.step()
            mean += cross_entropy / len(batch.tokens_MBS)
        if not math.isfinite(mean):
            raise not_finite(self.name)
        return _mean_over(mean, self._groups)


def _mixtral(run: RunConfig, *, with_balance_loss: bool) -> MixtralForCausalLM:
    model = run.model
    # Hugging Face draws first values from torch's generator; equal seeds make the ranks' copies equal.
    torch.manual_seed(run.train.seed)
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.moe.ffn_hidden,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.top_k,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        sliding_window=None,
        tie_word_embeddings=False,
        output_router_logits=with_balance_loss,
        router_aux_loss_coef=model.moe.balance_coefficient,
        use_cache=False,
    )
    made: MixtralForCausalLM = MixtralForCausalLM(config).float()
    return made


def _losses(
    model: nn.Module, tokens_BS: Tensor, labels_BS: Tensor, platform: Platform, coefficient: float
) -> tuple[Tensor, float]:
    """Of a micro-batch: what is trained on, with the router's charge, and the mean cross-entropy in it."""
    labels_BS = labels_BS.to(platform.device)
    # It would shift `labels` by one; ours are shifted already.
    out = model(input_ids=tokens_BS.to(platform.device), labels=labels_BS, shift_labels=labels_BS)
    charge = 0.0 if out.aux_loss is None else coefficient * float(out.aux_loss.detach())
    return out.loss, float(out.loss.detach()) - charge


def _adamw(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    optimizer = run.optimizer
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    kept = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )


def _deepspeed_config(run: RunConfig) -> dict[str, object]:
    train, parallel, optimizer = run.train, run.parallel, run.optimizer
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // train.micro_batch // parallel.data,
        "gradient_clipping": optimizer.clip_norm,
        "steps_per_print": 1 << 62,
        "zero_optimization": {"stage": parallel.zero},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
        "expert_parallel": {
            "enabled": True,
            "autoep_size": parallel.expert,
            "preset_model": "mixtral",
            "expert_activation": "geglu_tanh",
        },
    }


@contextmanager
def _old_output_registry() -> Iterator[None]:
    """AutoEP would register its router's logits as an output, with a registry that transformers 5.23 no longer has
    (deepspeed 0.19.8 module_inject/auto_ep_presets/base.py:326: `get` takes one argument now, and models for keys).
    Where there is none it leaves that out; nothing here reads those logits."""
    registry = output_capturing._CAN_RECORD_REGISTRY
    output_capturing._CAN_RECORD_REGISTRY = None
    try:
        yield
    finally:
        output_capturing._CAN_RECORD_REGISTRY = registry


def _mean_over(mean: float, groups: ProcessGroups) -> float:
    total = torch.tensor(mean, dtype=torch.float64)
    dist.all_reduce(total, group=groups.data)
    return float(total) / dist.get_world_size(groups.data)
