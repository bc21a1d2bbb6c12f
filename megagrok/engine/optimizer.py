"""AdamW inside DeepSpeed's ZeRO: parameter groups, DeepSpeed's configuration, and the state by global name.

DeepSpeed flattens each parameter group and cuts it over the ranks that hold the same weights, at positions that know
no tensor. `Shard` says which run of which local parameter this rank keeps, so that checkpoints need not know the cuts.
"""

from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megagrok.config.schema import OptimizerConfig, RunConfig
from megagrok.model.names import is_decayed
from megagrok.model.parts import LocalParameter
from megagrok.parallel.groups import Mpu, ProcessGroups, expert_group_name

MOMENTS = ("exp_avg", "exp_avg_sq")
# Buckets bound the memory of one reduction; with its default DeepSpeed would allocate 2 GB each step for any model.
_BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements begin..end of a flattened local parameter, whose fp32 weights and moments this rank keeps."""

    owner: LocalParameter
    begin: int
    end: int
    weight: Tensor
    """fp32, one-dimensional, a view: writing to it changes the state."""
    moments: dict[str, Tensor]


def make_deepspeed_engine(
    chunks: nn.ModuleList, parameters: list[LocalParameter], run: RunConfig, groups: ProcessGroups
) -> DeepSpeedEngine:
    """Give the model to DeepSpeed. Collective over all ranks. DeepSpeed's forward is never called."""
    for item in parameters:
        # Untagged, DeepSpeed's norm counts a split parameter on tensor rank 0 only (0.19.8 stage_1_and_2.py:2682).
        # Megatron tags its own linears, but only where it also fills them, which megagrok does itself.
        item.parameter.tensor_model_parallel = not item.is_replicated_over_tensor  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(
        _parameter_groups(parameters, run),
        lr=run.optimizer.lr,
        betas=(run.optimizer.beta1, run.optimizer.beta2),
        eps=run.optimizer.eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=chunks,
        optimizer=optimizer,
        config=deepspeed_config(run, parameters),
        mpu=Mpu(groups),
        dist_init_required=False,
    )
    for item in parameters:
        # Only after initialize: the norm skips it, the reduction must not.
        if item.is_tied_copy:
            item.parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
    _create_state(engine, run.parallel.zero)
    return engine


def deepspeed_config(run: RunConfig, parameters: list[LocalParameter]) -> dict[str, object]:
    """Our settings in DeepSpeed's words. Accumulation is Megatron's, so DeepSpeed sees one micro-batch per step."""
    is_low_precision = run.train.precision != "fp32"
    bucket = min(_BUCKET_ELEMENTS, max(item.parameter.numel() for item in parameters) * 4)
    replicas = run.parallel.data * run.parallel.context
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": replicas,
        "steps_per_print": 1 << 62,
        "gradient_clipping": run.optimizer.clip_norm if run.parallel.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.parallel.zero,
            # The other path ignores expert groups (deepspeed 0.19.8 stage_1_and_2.py, buffered_reduce_fallback).
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if is_low_precision:
        # Each micro-batch's gradient is added to the fp32 sum as soon as it is there; otherwise DeepSpeed would wait
        # for a call of its own backward, which never comes, and step with zeros.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Else fp32 sums would be rounded to bf16 on their way over the data ranks (deepspeed 0.19.8 engine.py:3800).
        config["communication_data_type"] = "fp32"
    return config


def shards(engine: DeepSpeedEngine, parameters: list[LocalParameter]) -> list[Shard]:
    """The state that this rank keeps, in the order of the parameters. Views, valid until the engine goes."""
    return [shard for item in parameters if (shard := _shard_of(engine, item)) is not None]


def set_step_count(engine: DeepSpeedEngine, step: int) -> None:
    """Tell AdamW how many updates its moments have seen (it corrects their bias by it)."""
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(step)


def _parameter_groups(parameters: list[LocalParameter], run: RunConfig) -> list[dict[str, object]]:
    """Matrices, then norms and embeddings, then experts: the same groups on every stage, because DeepSpeed does one
    collective per group and a stage with fewer would hang the others (deepspeed 0.19.8 stage_1_and_2.py:2646)."""
    optimizer: OptimizerConfig = run.optimizer
    dense = [item for item in parameters if not item.is_expert]
    decayed = [item.parameter for item in dense if is_decayed(item.parts[0].name)]
    kept = [item.parameter for item in dense if not is_decayed(item.parts[0].name)]
    experts = [item.parameter for item in parameters if item.is_expert]
    return [
        {"params": decayed, "weight_decay": optimizer.weight_decay, "name": "decayed"},
        {"params": kept, "weight_decay": 0.0, "name": "kept"},
        {
            "params": experts,
            "weight_decay": optimizer.weight_decay,
            "name": expert_group_name(run.parallel.expert),
            "moe": True,
        },
    ]


@torch.no_grad()
def _create_state(engine: DeepSpeedEngine, zero: int) -> None:
    """Create AdamW's moments now instead of at the first step, so that a state can be loaded into them.

    Linking is asked for by hand because DeepSpeed links all groups as soon as the first one has state
    (deepspeed 0.19.8 stage_1_and_2.py:852).
    """
    adamw = engine.basic_optimizer
    for group in adamw.param_groups:
        for weight in group["params"]:
            adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                **{moment: torch.zeros_like(weight) for moment in MOMENTS},
            }
    if zero:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _shard_of(engine: DeepSpeedEngine, item: LocalParameter) -> Shard | None:
    parameter = item.parameter
    if not engine.zero_optimization():
        state = engine.basic_optimizer.state[parameter]
        moments = {moment: state[moment].view(-1) for moment in MOMENTS}
        return Shard(item, 0, parameter.numel(), parameter.data.view(-1), moments)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    begin = mapping.lp_fragment_address.start
    moments = {moment: mapping.get_hp_fragment(moment) for moment in MOMENTS}
    return Shard(item, begin, begin + mapping.lp_fragment_address.numel, mapping.get_hp_fragment(), moments)
