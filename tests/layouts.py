"""What the laws of model and engine share: a small run, its batches, the oracle's step, and whole tensors again.

A rank function calls `start(run)` once for its groups, then builds as many engines as it likes with `build_engine`.
Tensors leave a rank as fragments; `whole` puts them together and proves that every element came exactly once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megagrok.checkpoint import Fragment
from megagrok.checkpoint.geometry import slices
from megagrok.config.schema import (
    CheckpointConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megagrok.data.batches import Batch
from megagrok.engine.engine import Engine, StepTotals, Update
from megagrok.model.loss import expert_load
from megagrok.model.names import is_decayed
from megagrok.model.reference import Grok, Totals, accumulate, make_reference
from megagrok.parallel.groups import ProcessGroups, make_groups
from megagrok.parallel.topology import Topology
from megagrok.plan import check
from megagrok.platform import find_platform

MODEL = ModelConfig(
    vocab_size=128,
    hidden=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    embedding_multiplier=32**0.5,
    output_multiplier=0.5,
    attention_softcap=30.0,
    final_softcap=50.0,
    # Larger than in training, so that scores, routers and soft-caps leave their linear range.
    init_std=0.1,
    moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=48, router_softcap=30.0),
)
RESIDUAL = replace(MODEL, attention_temperature_positions=6, moe=replace(MODEL.moe, residual_ffn_hidden=40))
TIED = replace(MODEL, tied_embeddings=True)
VARIANTS = {
    "plain": MODEL,
    "residual MLP and temperature": RESIDUAL,
    "tied": TIED,
    "renormalized": replace(MODEL, moe=replace(MODEL.moe, renormalize_top_k=True)),
    "no soft-caps": replace(
        MODEL, attention_softcap=None, final_softcap=None, moe=replace(MODEL.moe, router_softcap=None)
    ),
    "balance over a micro-batch": replace(MODEL, moe=replace(MODEL.moe, balance_loss="micro_batch")),
    "no balance loss": replace(MODEL, moe=replace(MODEL.moe, balance_loss="none")),
    "no router losses": replace(MODEL, moe=replace(MODEL.moe, balance_coefficient=0.0, z_loss_coefficient=0.0)),
    "one expert a token": replace(MODEL, moe=replace(MODEL.moe, top_k=1)),
    "every expert": replace(MODEL, moe=replace(MODEL.moe, top_k=4)),
    "one kv head a query head": replace(MODEL, num_kv_heads=4),
    "heads wider than the stream": replace(MODEL, head_dim=24),
}
"""Every switch of the architecture, thrown at least once."""


def in_tiers(names: Iterable[str], *, slow: tuple[str, ...]) -> list[object]:
    """Parameters of a test: `slow` ones go to the slow tier, since the default tier has a minute for all of them."""
    cases = list(names)
    assert set(slow) <= set(cases)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else pytest.param(name) for name in cases]


def make_run(
    model: ModelConfig = MODEL,
    parallel: ParallelConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    *,
    is_checked: bool = True,
    **train: object,
) -> RunConfig:
    """A run that `plan.check` accepts (or is not asked about), with four samples of sixteen tokens a step."""
    parallel = ParallelConfig() if parallel is None else parallel
    settings: dict[str, object] = {
        "steps": 10,
        "seq_len": 16,
        "global_batch": 4,
        "micro_batch": 1,
        "evaluate_every_steps": 5,
        "evaluate_samples": 4,
    }
    run = RunConfig(
        name="law",
        model=model,
        parallel=parallel,
        train=TrainConfig(**(settings | train)),
        # eps as in tests/tolerance.py: it keeps a gradient near zero from becoming a step of either sign.
        optimizer=optimizer or OptimizerConfig(lr=1e-2, eps=1e-5, clip_norm=0.5),
        checkpoint=CheckpointConfig(every_steps=5),
    )
    if is_checked:
        problems = [problem for problem in check(run) if not problem.key.startswith("data")]
        assert not problems, problems
    return run


def start(run: RunConfig, timeout_seconds: float = 30.0) -> ProcessGroups:
    """This rank's groups. Collective, once per process."""
    return make_groups(
        Topology.of(run.parallel),
        virtual_pipeline=run.parallel.virtual_pipeline,
        platform=find_platform(),
        timeout_seconds=timeout_seconds,
    )


def tokens_of(run: RunConfig, step: int) -> tuple[Tensor, Tensor]:
    """All samples of a step, [samples, S], and their labels; the same for every layout."""
    stream = torch.Generator().manual_seed(step)
    shape = (run.train.global_batch, run.train.seq_len + 1)
    # Squared, so that tokens are not equally common and routers get uneven loads.
    uniform = torch.rand(shape, generator=stream)
    samples = (uniform.square() * run.model.vocab_size).long()
    return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()


def batch_of(run: RunConfig, step: int, groups: ProcessGroups | None = None, labels: Tensor | None = None) -> Batch:
    """This rank's part of a step, or all of it for the oracle, dealt out as megagrok/data/batches.py says."""
    data_rank, data_size = (0, 1) if groups is None else (groups.coordinates.data, groups.topology.data)
    tokens, own_labels = tokens_of(run, step)
    shape = (-1, data_size, run.train.micro_batch, run.train.seq_len)
    numbers = torch.arange(step * len(tokens), (step + 1) * len(tokens)).view(shape[:3])[:, data_rank]
    return Batch(
        tokens_MBS=tokens.view(shape)[:, data_rank],
        labels_MBS=(own_labels if labels is None else labels).view(shape)[:, data_rank],
        sample_ids=tuple(numbers.flatten().tolist()),
        document_ids=(),
    )


def whole(fragments_by_rank: Iterable[Iterable[Fragment]]) -> dict[str, Tensor]:
    """The tensors that all ranks' fragments make up. Fails unless every element came exactly once."""
    tensors: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for fragments in fragments_by_rank:
        for fragment in fragments:
            data = fragment.data
            tensor = tensors.setdefault(fragment.name, torch.zeros(fragment.global_shape, dtype=data.dtype))
            count = times.setdefault(fragment.name, torch.zeros(fragment.global_shape, dtype=torch.int64))
            taken = 0
            for box in fragment.piece.boxes():
                place = slices(box, (0,) * len(box.start))
                tensor[place] = data[taken : taken + box.size].view(box.shape)
                count[place] += 1
                taken += box.size
    for name, count in times.items():
        assert bool((count == 1).all()), f"{name}: elements came {count.min()} to {count.max()} times"
    return tensors


def copies(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Fragments are views of live state: keep what they show now."""
    return [replace(fragment, data=fragment.data.clone()) for fragment in fragments]


def of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `kind`/NAME by NAME."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an engine, as one rank saw it."""

    totals: StepTotals
    gradients: list[Fragment]
    update: Update

    @property
    def loss(self) -> float:
        return self.totals.ce_sum / self.totals.num_tokens


def take_step(engine: Engine, batch: Batch, lr: float = 1e-2) -> Step:
    """One whole step. Collective."""
    totals = engine.forward_backward(batch)
    engine.reduce_gradients()
    gradients = copies(engine.gradient_fragments())
    return Step(totals, gradients, engine.step(lr))


@dataclass(frozen=True, slots=True)
class OracleStep:
    """One step of the oracle."""

    totals: Totals
    gradients: dict[str, Tensor]
    grad_norm: float

    @property
    def loss(self) -> float:
        return self.totals.ce_sum / self.totals.num_tokens


class Oracle:
    """The reference model under torch's own AdamW and clipping: what every layout has to equal."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.grok: Grok = make_reference(run.model, run.train.seed)
        self.load_LE: Tensor | None = None
        named = dict(self.grok.named_parameters())
        decayed = [weight for name, weight in named.items() if is_decayed(name)]
        kept = [weight for name, weight in named.items() if not is_decayed(name)]
        settings = run.optimizer
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )

    def take_step(self, batch: Batch, lr: float = 1e-2) -> OracleStep:
        """One step over all micro-batches."""
        self._adamw.zero_grad()
        seed, ids = self.run.train.seed, batch.sample_ids
        micro_batches = list(batch.tokens_MBS), list(batch.labels_MBS)
        totals = accumulate(self.grok, *micro_batches, self.load_LE, seed=seed, sample_ids=ids)
        gradients = {name: weight.grad.clone() for name, weight in self.grok.named_parameters()}
        limit = self.run.optimizer.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.grok.parameters(), limit))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.load_LE = expert_load(totals.tokens_per_expert_LE)
        return OracleStep(totals, gradients, norm)

    def weights(self) -> dict[str, Tensor]:
        """Current weights by name."""
        return {name: weight.detach().clone() for name, weight in self.grok.named_parameters()}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and each tensor within `tolerance` of its norm; names the worst."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    distances = {name: distance(actual[name], expected[name]) for name in expected}
    worst = max(distances, key=lambda name: distances[name])
    # Written so that a nan fails.
    assert all(value <= tolerance for value in distances.values()), f"{worst}: {distances[worst]:.2e} > {tolerance:.2e}"
