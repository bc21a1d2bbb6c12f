"""The twin: the user's model with every switch as it was set and every size small enough for eight CPU ranks.

Not a model to train. Sizes are chosen so that each layout of the grid divides them; soft-caps, multipliers, tying,
residual MLP, top-k, normalisation, balance loss, dropout, recomputation and optimizer constants are the user's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagrok.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megagrok.config.schema import Recompute
from megagrok.data.batches import Batch
from megagrok.model.loss import IGNORED_LABEL

LR, EPS = 1.0e-2, 1.0e-5
"""Those that the tolerances are stated for."""
CLIP_NORM = 0.1
"""A tenth of the norms that occur, or less, so that every step is clipped. It also brings gradients near zero below
EPS, where AdamW is linear in them; clipped to 0.5, rounding became steps of either sign, and in five steps losses
drifted by 4e-7 instead of 2e-7, weights by 2e-5 instead of 5e-6."""

_HIDDEN, _VOCAB, _SEQ_LEN, _SAMPLES = 64, 256, 32, 8
_KV_HEADS, _MOST_HEADS_PER_KV = 4, 8
_TEMPERATURE_START = 8
# Weights of this size let scores, routers and soft-caps leave their linear range, and a step of AdamW is then a small
# part of them: at 0.02 even the oracle in fp32 leaves the one in fp64 by 4e-5 within five steps.
_INIT_STD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """What the twin takes over from a run besides its model."""

    seed: int = 1234
    recompute: Recompute = "none"
    deterministic: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1

    @classmethod
    def of(cls, run: RunConfig) -> "Switches":
        """The switches of a run."""
        train, optimizer = run.train, run.optimizer
        return cls(
            seed=train.seed,
            recompute=train.recompute,
            deterministic=train.deterministic,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            weight_decay=optimizer.weight_decay,
        )


def shrink(model: ModelConfig, num_layers: int) -> ModelConfig:
    """The model at the twin's sizes: heads keep their ratio up to 8 query heads per kv head, experts are 4 or 8."""
    moe, heads_per_kv = model.moe, min(model.num_heads // model.num_kv_heads, _MOST_HEADS_PER_KV)
    num_experts = num_twin_experts(model)
    has_temperature = model.attention_temperature_positions is not None
    return replace(
        model,
        vocab_size=_VOCAB,
        hidden=_HIDDEN,
        num_layers=num_layers,
        num_heads=_KV_HEADS * heads_per_kv,
        num_kv_heads=_KV_HEADS,
        head_dim=16 if heads_per_kv == 1 else 8,
        max_positions=_SEQ_LEN,
        attention_temperature_positions=_TEMPERATURE_START if has_temperature else None,
        # The embedding enters the residual stream as large as it does in the user's model.
        embedding_multiplier=model.embedding_multiplier * (_HIDDEN / model.hidden) ** 0.5,
        init_std=_INIT_STD,
        moe=replace(
            moe,
            num_experts=num_experts,
            top_k=min(moe.top_k, num_experts),
            ffn_hidden=48,
            residual_ffn_hidden=None if moe.residual_ffn_hidden is None else 64,
        ),
    )


def num_twin_experts(model: ModelConfig) -> int:
    """8 experts if the model has as many, else 4."""
    return 8 if model.moe.num_experts >= 8 else 4


def make_twin(
    model: ModelConfig, switches: Switches, *, parallel: ParallelConfig, micro_batch: int, num_layers: int, steps: int
) -> RunConfig:
    """The run that every rank of a layout builds, and the oracle too."""
    return RunConfig(
        name="twin",
        model=shrink(model, num_layers),
        parallel=parallel,
        train=TrainConfig(
            seed=switches.seed,
            steps=steps,
            seq_len=_SEQ_LEN,
            global_batch=_SAMPLES,
            micro_batch=micro_batch,
            recompute=switches.recompute,
            deterministic=switches.deterministic,
            evaluate_every_steps=steps,
            evaluate_samples=_SAMPLES,
        ),
        optimizer=OptimizerConfig(
            lr=LR,
            eps=EPS,
            clip_norm=CLIP_NORM,
            beta1=switches.beta1,
            beta2=switches.beta2,
            weight_decay=switches.weight_decay,
        ),
        checkpoint=CheckpointConfig(every_steps=steps),
    )


def twin_batch(run: RunConfig, step: int, data_rank: int = 0, data_size: int = 1) -> Batch:
    """A data rank's part of a step, dealt out as megagrok/data/batches.py does.

    Tokens are not equally common, so that experts get uneven loads; a part of the first two samples' labels does not
    count, so that neither data ranks nor context ranks see equally many tokens and a mean of means shows.
    """
    stream = torch.Generator().manual_seed(run.train.seed * 1000 + step)
    shape = (run.train.global_batch, run.train.seq_len + 1)
    tokens = (torch.rand(shape, generator=stream).square() * run.model.vocab_size).long()
    labels = tokens[:, 1:].clone()
    labels[0, : run.train.seq_len // 2] = IGNORED_LABEL
    labels[1, : run.train.seq_len // 8] = IGNORED_LABEL
    numbers = torch.arange(step * run.train.global_batch, (step + 1) * run.train.global_batch)
    return Batch(
        tokens_MBS=_deal(tokens[:, :-1], run, data_rank, data_size),
        labels_MBS=_deal(labels, run, data_rank, data_size),
        sample_ids=tuple(_deal(numbers, run, data_rank, data_size).flatten().tolist()),
        document_ids=(),
    )


def _deal(samples: Tensor, run: RunConfig, data_rank: int, data_size: int) -> Tensor:
    dealt = samples.reshape(-1, data_size, run.train.micro_batch, *samples.shape[1:])
    return dealt[:, data_rank].contiguous()
