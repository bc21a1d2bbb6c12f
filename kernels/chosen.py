"""The operations of a model, each in the implementation that was chosen for it."""

from dataclasses import dataclass

import torch

from megagrok.config.schema import KernelsConfig
from megagrok.kernels.attention import Attention, choose_attention
from megagrok.kernels.cross_entropy import CrossEntropy, choose_cross_entropy
from megagrok.kernels.experts import Experts, choose_experts
from megagrok.kernels.norm import Norm, choose_norm
from megagrok.kernels.permute import Permute, choose_permute
from megagrok.kernels.router import Router, choose_router


@dataclass(frozen=True, slots=True)
class Kernels:
    """Signatures are those of the operations' own folders."""

    attention: Attention
    cross_entropy: CrossEntropy
    experts: Experts
    norm: Norm
    permute: Permute
    router: Router


def choose_kernels(names: KernelsConfig, device: torch.device) -> Kernels:
    """Import what was named. Raises KernelError for a name that this machine cannot run."""
    return Kernels(
        attention=choose_attention(names.attention, device),
        cross_entropy=choose_cross_entropy(names.cross_entropy, device),
        experts=choose_experts(names.experts, device),
        norm=choose_norm(names.norm, device),
        permute=choose_permute(names.permute, device),
        router=choose_router(names.router, device),
    )
