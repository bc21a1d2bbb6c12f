"""Other ways to train the same shape, to be raced against ours; the only files that import them.

What each is, and what it cannot do, is known without importing it: a peer that is not installed, or that has no such
layout, is a row that says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megagrok.config import RunConfig

if TYPE_CHECKING:
    from megagrok.bench.peers.contender import Contender
    from megagrok.parallel.groups import ProcessGroups
    from megagrok.platform import Platform

    Make = Callable[[RunConfig, ProcessGroups, Platform], Contender]

OURS = "megagrok"


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender by its short name."""

    title: str
    libraries: tuple[str, ...]
    differs: str
    """From ours, in words for the page."""
    has_stages: bool
    """Knows tensor and pipeline parallelism."""
    load: "Callable[[], Make]"
    """Imports it, before ranks are forked that have it then; returns what makes the contender on each of them."""

    def why_not(self, run: RunConfig) -> str | None:
        """Why it cannot take part here; None if it can."""
        missing = [name for name in self.libraries if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if not self.has_stages and run.parallel.tensor * run.parallel.pipeline > 1:
            return "data-parallel only, and the layout has tensor or pipeline ranks"
        return None


def _megagrok() -> "Make":
    from megagrok.bench.peers.megagrok_step import MegagrokStep

    return MegagrokStep


def _megatron() -> "Make":
    from megagrok.bench.peers.megatron_gpt import MegatronStep

    return MegatronStep


def _ddp() -> "Make":
    from megagrok.bench.peers.mixtral import MixtralDdpStep

    return MixtralDdpStep


def _auto_ep() -> "Make":
    from megagrok.bench.peers.mixtral import MixtralAutoEpStep

    return MixtralAutoEpStep


def _stock() -> "Make":
    from megagrok.bench.peers.stock_moe import StockMoeStep

    return StockMoeStep


# `stock` last: see StockMoeStep.
PEERS = {
    OURS: Peer(
        "megagrok",
        (),
        "the step of `megagrok train`: all of Grok, three soft-caps and norms before and after every sub-block, on "
        "Megatron-core's schedule with DeepSpeed's expert groups and ZeRO optimizer",
        True,
        _megagrok,
    ),
    "megatron": Peer(
        "megatron-core GPTModel",
        ("megatron",),
        "Megatron's own model, `MoELayer` (SequentialMLP, allgather dispatcher: alltoall needs CUDA) and "
        "DotProductAttention, on the same schedule and groups. No soft-caps and half the norms, so it does less. "
        "Its optimizer is torch's fused AdamW around one all-reduce for the norm, because Megatron's own needs CUDA",
        True,
        _megatron,
    ),
    "ddp": Peer(
        "HF Mixtral + DDP",
        ("transformers",),
        "Hugging Face's Mixtral with the same sizes, experts included, under torch's DDP with fused AdamW: every rank "
        "holds and reduces all experts. No soft-caps, half the norms, balance loss but no z-loss",
        False,
        _ddp,
    ),
    "autoep": Peer(
        "DeepSpeed AutoEP on HF Mixtral",
        ("transformers", "deepspeed"),
        "the same Mixtral, its expert layers replaced by DeepSpeed's AutoEP over the same expert "
        "ranks (grouped matmul, all-to-all), in DeepSpeed's engine with the same ZeRO stage. No soft-caps, half the "
        "norms, no balance loss; AutoEP's report of router logits, which transformers 5.23 has no place for, is left "
        "out",
        False,
        _auto_ep,
    ),
    "stock": Peer(
        "deepspeed stock MoE",
        ("deepspeed",),
        "megagrok's model and engine with DeepSpeed's `MoE` layer (`drop_tokens=False`, no random second expert) in "
        "every mlp slot. Its router has no soft-cap and no z-loss and renormalizes; with those settings equal both "
        "give the same losses (tests/bench/test_compare.py). The layer assumes that tensor ranks hold copies of the "
        "same tokens; under sequence parallelism they do not, so it is told that there is no tensor parallelism",
        True,
        _stock,
    ),
}
