"""Process groups of Megatron-core and DeepSpeed, made from one Topology and proven to be the same ranks.

Both libraries keep their groups in module globals; this file is the only one that fills them. Everything else gets a
`ProcessGroups` and asks no library who its neighbours are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state

from megagrok.errors import TopologyError
from megagrok.parallel.cpu_seam import install_cpu_seam
from megagrok.parallel.topology import Coordinates, Topology
from megagrok.platform import Platform

Group = dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """This rank's groups, one handle per meaning. All are torch.distributed groups of the run's backend."""

    topology: Topology
    coordinates: Coordinates
    tensor: Group
    context: Group
    tensor_context: Group
    """Ranks that share a micro-batch."""
    data: Group
    """Ranks that hold the same dense weights and see other tokens: data x context."""
    pipeline: Group
    model: Group
    """Ranks that hold one copy of the dense weights: tensor x pipeline."""
    embedding: Group | None
    """First and last stage, which share a tied embedding; None on the stages between."""
    expert: Group
    expert_data: Group

    @property
    def is_first_stage(self) -> bool:
        """True where the pipeline begins."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the pipeline ends."""
        return self.coordinates.pipeline == self.topology.pipeline - 1


class Mpu:
    """What DeepSpeed calls a model parallel unit: the groups that Megatron made, under the names DeepSpeed asks for.

    "Model parallel" must be tensor x pipeline (norm, overflow: deepspeed 0.19.8 zero/stage_1_and_2.py:2642), and
    "data parallel" must include the context ranks, because they hold the same weights and see other tokens.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> Group:
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.model)

    def get_data_parallel_group(self) -> Group:
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.data)

    def get_tensor_model_parallel_group(self) -> Group:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.coordinates.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.topology.tensor

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._groups.tensor)[0]

    def get_pipeline_model_parallel_group(self) -> Group:
        return self._groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.coordinates.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.topology.pipeline


def make_groups(
    topology: Topology, *, virtual_pipeline: int, platform: Platform, timeout_seconds: float
) -> ProcessGroups:
    """Make every group of the run. Collective: all ranks of an initialised torch.distributed call it, once.

    timeout_seconds: how long one collective waits for a peer; new groups would wait half an hour whatever the world's.
    Raises TopologyError if the world has another size than the topology, or if the libraries place a rank differently.
    """
    if dist.get_world_size() != topology.world_size:
        raise TopologyError(
            f"the job has {dist.get_world_size()} ranks, the configuration asks for {topology.world_size} "
            "(tensor * context * data * pipeline)"
        )
    install_cpu_seam(platform)
    # Of all its ops DeepSpeed would compile one here, a CPU all-reduce for inference; a build that is killed leaves a
    # lock on which every later start hangs (deepspeed 0.19.8 comm/torch.py:47). Told that none is compatible it does
    # not, and does not run a compiler in every rank to find out (ops/__init__.py:33).
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend=platform.backend, dist_init_required=False)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=topology.context,
        expert_model_parallel_size=topology.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    coordinates = topology.coordinates(dist.get_rank())
    edge_stage = coordinates.pipeline in (0, topology.pipeline - 1)
    groups = ProcessGroups(
        topology=topology,
        coordinates=coordinates,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        tensor_context=parallel_state.get_tensor_and_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group() if edge_stage else None,
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
    )
    # DeepSpeed's builder reads the pipeline size from its global mpu, so that has to be known before the groups are.
    deepspeed_groups.mpu = Mpu(groups)
    _make_deepspeed_expert_groups(topology.expert, timedelta(seconds=timeout_seconds))
    _prove_agreement(groups)
    return groups


def kinds_of_groups(groups: ProcessGroups) -> dict[str, str]:
    """Name of each torch.distributed group of this rank, Megatron's and DeepSpeed's -> what it is, in our words."""
    name = expert_group_name(groups.topology.expert)
    kinds: list[tuple[str, Group | None]] = [
        ("world", dist.group.WORLD),
        ("tensor", groups.tensor),
        ("context", groups.context),
        ("tensor_context", groups.tensor_context),
        ("data", groups.data),
        ("data", deepspeed_groups._get_data_parallel_group()),
        ("pipeline", groups.pipeline),
        ("model", groups.model),
        ("embedding", groups.embedding),
        ("expert", groups.expert),
        ("expert", deepspeed_groups._get_expert_parallel_group(name)),
        ("expert_data", groups.expert_data),
        ("expert_data", deepspeed_groups._get_expert_data_parallel_group(name)),
    ]
    return {group.group_name: kind for kind, group in kinds if group is not None}


def _make_deepspeed_expert_groups(expert: int, timeout: timedelta) -> None:
    deepspeed_groups._create_expert_and_data_parallel(expert)
    name = expert_group_name(expert)
    for group in (
        deepspeed_groups._get_expert_parallel_group(name),
        deepspeed_groups._get_expert_data_parallel_group(name),
    ):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def expert_group_name(expert: int) -> str:
    """The key under which DeepSpeed files the expert groups of this size (deepspeed/moe/layer.py, MoE)."""
    return f"ep_size_{expert}"


def _prove_agreement(groups: ProcessGroups) -> None:
    """Every group that either library made has the ranks that the topology says, in that order."""
    topology, name = groups.topology, expert_group_name(groups.topology.expert)
    deepspeed_expert: Callable[[str], Group] = deepspeed_groups._get_expert_parallel_group
    deepspeed_expert_data: Callable[[str], Group] = deepspeed_groups._get_expert_data_parallel_group
    claims: list[tuple[str, Group, list[list[int]]]] = [
        ("Megatron's tensor", groups.tensor, topology.groups("tensor")),
        ("Megatron's context", groups.context, topology.groups("context")),
        ("Megatron's tensor-context", groups.tensor_context, topology.groups("tensor", "context")),
        ("Megatron's data-context", groups.data, topology.groups("data", "context")),
        ("Megatron's pipeline", groups.pipeline, topology.groups("pipeline")),
        ("Megatron's model", groups.model, topology.groups("tensor", "pipeline")),
        ("Megatron's expert", groups.expert, topology.expert_groups()),
        ("Megatron's expert-data", groups.expert_data, topology.expert_data_groups()),
        ("DeepSpeed's expert", deepspeed_expert(name), topology.expert_groups()),
        ("DeepSpeed's expert-data", deepspeed_expert_data(name), topology.expert_data_groups()),
        ("DeepSpeed's data", deepspeed_groups._get_data_parallel_group(), topology.groups("data", "context")),
    ]
    rank = dist.get_rank()
    for owner, group, table in claims:
        expected = next(ranks for ranks in table if rank in ranks)
        actual = dist.get_process_group_ranks(group)
        if actual != expected:
            raise TopologyError(
                f"{owner} group of rank {rank} is {actual}, the topology says {expected}. "
                "The library orders ranks differently in this version; do not train with it."
            )
