"""One training engine with few handles, each a verb: forward_backward, update, evaluate, state out, state in.

Megatron-core runs the micro-batches through the pipeline; DeepSpeed reduces, clips and steps. Foreign types stop here.

The loss is a sum over tokens. It is divided once, by the number of tokens of the whole step, through Megatron's
`grad_scale_func`, which scales the last stage's loss and the routers' auxiliary losses alike. DeepSpeed averages over
the data ranks where a sum is due, so the scale carries their number.
"""

# M micro-batches of this data rank, B micro-batch, S sequence, s this rank's positions, L layers, E experts

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megagrok.checkpoint import Checkpoint, Fragment
from megagrok.config.schema import ModelConfig, RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.gradients import global_norm, sum_over_tensor_ranks, sum_tied_embeddings
from megagrok.engine.optimizer import Shard, make_deepspeed_engine, set_step_count, shards
from megagrok.engine.replicas import Replica, replicated
from megagrok.engine.state import GRADIENT, WEIGHT, cut, is_spoken_for, load_state, router_fragments, shard_fragments
from megagrok.errors import DataError
from megagrok.model.grok import GrokModel
from megagrok.model.loss import IGNORED_LABEL, expert_load
from megagrok.model.parts import LocalParameter, fill_initial_values, local_parameters
from megagrok.model.transformer_config import GrokTransformerConfig, make_transformer_config
from megagrok.parallel.context import context_positions
from megagrok.parallel.groups import ProcessGroups
from megagrok.platform import Platform, check_precision

Fill = Callable[[list[LocalParameter], ModelConfig, int], None]


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Sums over the whole step, equal on all ranks. Divide the first three by num_tokens."""

    ce_sum: float
    balance_sum: float
    z_sum: float
    num_tokens: int
    tokens_per_expert_LE: Tensor
    """Choices of each expert, int64, on the CPU."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did; equal on all ranks."""

    grad_norm: float
    clip_coefficient: float
    is_applied: bool
    """False if the gradient was not finite: then no rank moved a weight."""


class Engine:
    """The model on this rank and its optimizer. Made by `build_engine`; every method is collective over all ranks."""

    def __init__(
        self,
        run: RunConfig,
        groups: ProcessGroups,
        platform: Platform,
        config: GrokTransformerConfig,
        chunks: list[GrokModel],
        parameters: list[LocalParameter],
    ) -> None:
        self._run, self._groups, self._platform, self._config = run, groups, platform, config
        self._chunks, self._parameters = chunks, parameters
        self._deepspeed = make_deepspeed_engine(nn.ModuleList(chunks), parameters, run, groups)
        self._optimizer = self._deepspeed.optimizer
        self._is_bf16 = isinstance(self._optimizer, BF16_Optimizer)
        if run.parallel.zero and not self._is_bf16:
            # Its backward hooks would reduce each micro-batch on its own; `reduce_gradients` does it once a step.
            for hook in self._optimizer._grad_acc_hooks:
                hook.remove()
        self._pending_load_LE: Tensor | None = None
        self.num_updates = 0
        """Updates that were applied; steps that were refused are not among them. AdamW corrects its moments by it."""

    def forward_backward(self, batch: Batch) -> StepTotals:
        """Run all micro-batches through the pipeline and back. Gradients of the step's mean loss are then in place,
        not yet reduced. Raises DataError, on all ranks, if no label of the step counts; nothing on a loss that is not
        finite: `update` looks at that."""
        num_tokens = self._count_tokens(batch)
        if num_tokens == 0:
            raise DataError("the step has no label that counts on any rank; its mean loss has no value")
        scale = dist.get_world_size(self._groups.data) / num_tokens
        self._config.grad_scale_func = lambda loss: loss * scale
        losses = self._run_schedule(batch, forward_only=False)
        totals = self._reduce_totals(losses, num_tokens)
        self._pending_load_LE = expert_load(totals.tokens_per_expert_LE)
        return totals

    def update(self, lr: float) -> Update:
        """Reduce the gradients, clip by the true global norm, step. Leaves no gradient behind."""
        self.reduce_gradients()
        return self.step(lr)

    def reduce_gradients(self) -> None:
        """Make the gradients whole: over tensor ranks, tied embeddings, then data and expert-data ranks."""
        sum_over_tensor_ranks(self._parameters, self._groups, self._gradient_of)
        if self._run.model.tied_embeddings:
            sum_tied_embeddings(self._parameters, self._groups, self._gradient_of)
        if self._run.parallel.zero == 0 or self._is_bf16:
            self._deepspeed.buffered_allreduce_fallback()
        else:
            self._optimizer.set_gradient_accumulation_boundary(True)
            self._optimizer.reduce_gradients(pipeline_parallel=True)

    def step(self, lr: float) -> Update:
        """Clip and step with gradients that `reduce_gradients` has made whole."""
        for group in self._deepspeed.basic_optimizer.param_groups:
            group["lr"] = lr
        update = self._step_unsharded() if self._run.parallel.zero == 0 else self._step_sharded()
        self.num_updates += update.is_applied
        if update.is_applied and self._pending_load_LE is not None:
            for chunk in self._chunks:
                for layer in chunk.decoder.layers:
                    layer.mlp.router.load_E.copy_(self._pending_load_LE[layer.layer_number - 1])
        self._pending_load_LE = None
        return update

    def gradient_norm(self) -> float:
        """Global norm of the gradients that `reduce_gradients` has made whole, each element counted once; infinite
        where its square does not fit fp32, as it is in `step`."""
        square = torch.zeros((), dtype=torch.float64, device=self._platform.device)
        for shard, values in self.gradient_shards():
            if is_spoken_for(shard.owner, self._groups, zero=self._run.parallel.zero):
                square += torch.linalg.vector_norm(values, dtype=torch.float32).double() ** 2
        dist.all_reduce(square)
        return float(square.float().sqrt())

    def drop_gradients(self) -> Update:
        """Instead of `step`: nothing moves, and nothing of the gradients is left for the next one.

        DeepSpeed keeps gradients in places that differ with the ZeRO stage and the precision, and clears all of them
        when it meets one that is not finite. So it is shown one.
        """
        for _, values in self.gradient_shards():
            values[:1] = float("inf")
        update = self.step(0.0)
        assert not update.is_applied
        return update

    def find_bad_gradient(self) -> tuple[str, int] | None:
        """The first tensor, in the order of the backward pass, whose gradient on this rank is not finite, and how many
        there are; between `forward_backward` and `reduce_gradients`. Local."""
        bad = [
            part.name
            for item in self._parameters
            for part in item.parts
            if not self._gradient_of(item.parameter).view(-1)[part.offset : part.offset + part.size].isfinite().all()
        ]
        return (bad[-1], len(bad)) if bad else None

    def find_bad_state(self) -> str | None:
        """A tensor of this rank's shards, weight or moment, that is not finite; None if all are. Local."""
        for shard in shards(self._deepspeed, self._parameters):
            for kind, values in {WEIGHT: shard.weight, **shard.moments}.items():
                if not values.isfinite().all():
                    return f"{kind}/{shard.owner.parts[0].name}"
        return None

    def replicated(self) -> Iterator[Replica]:
        """Everything on this rank that others hold too and have to hold bit by bit; see replicas.py."""
        return replicated(self._parameters, self._chunks, self._held_whole(), self._groups)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Sum of the cross-entropy over the batch's tokens and their number, without gradients."""
        for chunk in self._chunks:
            chunk.eval()
        losses = self._run_schedule(batch, forward_only=True)
        for chunk in self._chunks:
            chunk.train()
        totals = self._reduce_totals(losses, self._count_tokens(batch))
        return totals.ce_sum, totals.num_tokens

    def state_fragments(self) -> Iterator[Fragment]:
        """Everything a resumed run needs of the engine; over all ranks each element comes exactly once."""
        held = shards(self._deepspeed, self._parameters)
        return chain(
            shard_fragments(held, self._run.model, self._groups, zero=self._run.parallel.zero),
            router_fragments(self._chunks, self._groups),
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint of this model, written by any layout. Raises CheckpointError."""
        load_state(checkpoint, self._parameters, shards(self._deepspeed, self._parameters), self._chunks)
        # A checkpoint that does not say has refused no step.
        self.num_updates = int(str(checkpoint.facts.get("updates", checkpoint.step)))
        set_step_count(self._deepspeed, self.num_updates)

    @property
    def local_parameters(self) -> list[LocalParameter]:
        """Every parameter of this rank and what it holds, copies too."""
        return self._parameters

    def gradient_fragments(self) -> Iterator[Fragment]:
        """Reduced gradients, between `reduce_gradients` and `step`; over all ranks each element comes exactly once."""
        for shard, values in self.gradient_shards():
            if is_spoken_for(shard.owner, self._groups, zero=self._run.parallel.zero):
                yield from cut(GRADIENT, shard.owner, shard.begin, shard.end, values, self._run.model)

    def gradient_shards(self) -> Iterator[tuple[Shard, Tensor]]:
        """Every shard of this rank with its reduced gradient, copies of other ranks' too; between the same two."""
        for shard in shards(self._deepspeed, self._parameters):
            values = self._reduced_gradient(shard.owner.parameter)
            if values.numel() == shard.owner.parameter.numel():
                values = values[shard.begin : shard.end]
            yield shard, values

    def _held_whole(self) -> list[Shard]:
        """Shards of the optimizer that every replica keeps: all without ZeRO, none with it."""
        return [] if self._run.parallel.zero else shards(self._deepspeed, self._parameters)

    def _run_schedule(self, batch: Batch, *, forward_only: bool) -> list[Tensor]:
        """Megatron's schedule over the micro-batches; on the last stage the loss sum of each."""
        tokens_MBS = batch.tokens_MBS.to(self._platform.device)
        labels_MBS = batch.labels_MBS.to(self._platform.device)
        num_micro_batches, micro_batch, seq_len = tokens_MBS.shape
        place, topology = self._groups.coordinates, self._groups.topology
        positions_s = context_positions(seq_len, place.context, topology.context).to(self._platform.device)
        sample_ids_MB = [None] * num_micro_batches if forward_only else self._sample_ids(batch)
        micro_batches = list(
            zip(tokens_MBS[:, :, positions_s], labels_MBS[:, :, positions_s], sample_ids_MB, strict=True)
        )

        def forward_step(micro_batch_iterator: Iterator[tuple[Tensor, Tensor, Tensor | None]], chunk: GrokModel):  # type: ignore[no-untyped-def]
            tokens_Bs, labels_Bs, sample_ids_B = next(micro_batch_iterator)
            return chunk(tokens_Bs, labels_Bs, positions_s, sample_ids_B), _report_sum

        run_schedule = get_forward_backward_func()
        losses: list[Tensor] = run_schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=num_micro_batches,
            seq_length=seq_len,
            micro_batch_size=micro_batch,
            forward_only=forward_only,
        )
        return losses

    def _sample_ids(self, batch: Batch) -> list[Tensor | None]:
        """For each micro-batch its sample ids on the device, or None if nothing asks for them."""
        num_micro_batches, micro_batch, _ = batch.tokens_MBS.shape
        if not self._run.model.dropout:
            return [None] * num_micro_batches
        if len(batch.sample_ids) != num_micro_batches * micro_batch:
            raise DataError(
                f"{len(batch.sample_ids)} sample ids for {num_micro_batches} micro-batches of {micro_batch}: "
                "dropout needs one for each sample"
            )
        ids = torch.tensor(batch.sample_ids, device=self._platform.device)
        return list(ids.view(num_micro_batches, micro_batch))

    def _count_tokens(self, batch: Batch) -> int:
        """Labels of the step that count, over all data ranks. The data ranks' batches differ; context ranks share."""
        counted = (batch.labels_MBS != IGNORED_LABEL).sum().to(self._platform.device)
        dist.all_reduce(counted, group=self._groups.data)
        return int(counted) // self._groups.topology.context

    def _reduce_totals(self, losses: list[Tensor], num_tokens: int) -> StepTotals:
        """One collective: loss of the last stage, statistics of every layer's router."""
        model = self._run.model
        num_layers, num_experts = model.num_layers, model.moe.num_experts
        packed = torch.zeros(3 + num_layers * num_experts, dtype=torch.float64, device=self._platform.device)
        if self._groups.is_last_stage and self._groups.coordinates.tensor == 0:
            packed[0] = torch.stack(losses).double().sum()
        counts_LE = packed[3:].view(num_layers, num_experts)
        for chunk in self._chunks:
            for layer in chunk.decoder.layers:
                routed = layer.mlp.take_totals()
                packed[1] += routed.balance_sum
                packed[2] += routed.z_sum
                counts_LE[layer.layer_number - 1] = routed.tokens_per_expert_E
        dist.all_reduce(packed)
        on_host = packed.cpu()
        ce_sum, balance_sum, z_sum = on_host[:3].tolist()
        return StepTotals(ce_sum, balance_sum, z_sum, num_tokens, on_host[3:].view(num_layers, num_experts).long())

    def _step_unsharded(self) -> Update:
        norm = float(global_norm(self._parameters, self._groups, self._gradient_of))
        is_finite = norm < float("inf")
        coefficient = self._clip_coefficient(norm)
        if is_finite:
            if coefficient < 1:
                torch._foreach_mul_([self._gradient_of(item.parameter) for item in self._parameters], coefficient)
            self._deepspeed.step()
        self._deepspeed.zero_grad()
        return Update(norm, coefficient, is_finite)

    def _step_sharded(self) -> Update:
        """DeepSpeed computes the norm, refuses to step if it is not finite, clips, steps, and gathers the weights."""
        self._deepspeed.step()
        norm = float(self._optimizer._global_grad_norm)
        is_applied = not self._optimizer.overflow
        return Update(norm if is_applied else float("nan"), self._clip_coefficient(norm), is_applied)

    def _clip_coefficient(self, norm: float) -> float:
        limit = self._run.optimizer.clip_norm
        return min(1.0, limit / (norm + 1e-6)) if limit else 1.0

    def find_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Where the step's gradient is accumulated, in fp32, also for bf16 weights; None where it is made later."""
        gradient: Tensor | None = parameter._hp_grad if self._is_bf16 else parameter.grad  # type: ignore[attr-defined]
        return gradient

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor:
        gradient = self.find_gradient(parameter)
        assert gradient is not None
        return gradient

    def _reduced_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The reduced gradient, flat: this rank's shard of it, or all of it where DeepSpeed keeps all."""
        if self._run.parallel.zero == 0 or self._is_bf16:
            return self._gradient_of(parameter).flatten()
        fragment: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return fragment.flatten()


def build_engine(
    run: RunConfig, groups: ProcessGroups, platform: Platform, *, fill: Fill = fill_initial_values
) -> Engine:
    """Build this rank's part of the model with its initial weights, and its optimizer. Collective over all ranks.

    fill: gives the weights their first values; a rehearsal, whose tensors hold none, gives none.
    Raises MachineError if the device cannot do the precision.
    """
    check_precision(platform, run.train.precision)
    torch.use_deterministic_algorithms(run.train.deterministic)
    config = make_transformer_config(run, groups, platform)
    chunks = _build_chunks(config, run, groups, platform)
    parameters = [item for chunk in chunks for item in local_parameters(chunk)]
    fill(parameters, run.model, run.train.seed)
    return Engine(run, groups, platform, config, chunks, parameters)


def _build_chunks(
    config: GrokTransformerConfig, run: RunConfig, groups: ProcessGroups, platform: Platform
) -> list[GrokModel]:
    """One chunk per virtual stage; the model begins in the first stage's first and ends in the last stage's last."""
    num_chunks = run.parallel.virtual_pipeline
    chunks = []
    for number in range(num_chunks):
        chunk = GrokModel(
            config,
            pre_process=groups.is_first_stage and number == 0,
            post_process=groups.is_last_stage and number == num_chunks - 1,
            vp_stage=number if num_chunks > 1 else None,
        )
        chunk = chunk.to(device=platform.device)
        for parameter in chunk.parameters():
            # Not chunk.to(dtype): it would round buffers too, and the routers' loads are fp64.
            parameter.data = parameter.data.to(config.params_dtype)
        chunks.append(chunk)
    return chunks


def _report_sum(loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss function: the sum, a token count it does not use, and a copy to report (it scales the first)."""
    return loss_sum, torch.zeros((), dtype=torch.int, device=loss_sum.device), loss_sum.detach().clone()
