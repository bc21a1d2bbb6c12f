"""What the cost of a step depends on, in plain numbers: the model's shape, one layout of it, and the trainer's habits.

The planner's own words, so that the one set of formulas prices our runs and published runs of other models and
trainers alike. `ModelConfig` and `RunConfig` are translated here, once.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megagrok.config.schema import KernelsConfig, ModelConfig, ParallelConfig, Precision, Recompute, RunConfig
from megagrok.plan.batch import num_micro_batches


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer: attention in every layer, then a dense MLP or experts. Widths are elements, counts are whole."""

    layers: int
    dense_layers: int
    """Of them, those with a dense MLP instead of experts."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    attention_params: int
    """Of one layer: its projections, whatever their kind (grouped queries, latent)."""
    dense_ffn: int
    expert_ffn: int
    experts: int
    """Routed experts of a layer; 0 in a dense model."""
    top_k: int
    shared_ffn: int
    """Width of the dense MLP that stands beside the experts; 0 if none."""
    ffn_matrices: int
    """Matrices of one MLP: 3 if gated, else 2."""
    vocab: int
    tied: bool

    @classmethod
    def of(cls, model: ModelConfig) -> "Shape":
        """The shape of one of our models."""
        return cls(
            layers=model.num_layers,
            dense_layers=0,
            hidden=model.hidden,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            attention_params=2 * model.hidden * (model.num_heads + model.num_kv_heads) * model.head_dim,
            dense_ffn=0,
            expert_ffn=model.moe.ffn_hidden,
            experts=model.moe.num_experts,
            top_k=model.moe.top_k,
            shared_ffn=model.moe.residual_ffn_hidden or 0,
            ffn_matrices=3,
            vocab=model.vocab_size,
            tied=model.tied_embeddings,
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to spread a step over ranks. World: tensor * context * pipeline * data ranks."""

    tensor: int
    sequence: bool
    pipeline: int
    virtual_pipeline: int
    context: int
    expert: int
    expert_tensor: int
    """Ranks that share one expert's matrices; ours are never split: 1."""
    data: int
    zero: int
    """0 to 3; 3 also shards and gathers the weights (FSDP), which megagrok does not."""
    seq_len: int
    micro_batch: int
    num_micro_batches: int
    """Of each replica in one step."""
    precision: Precision
    recompute: Recompute

    @classmethod
    def of(cls, run: RunConfig) -> "Layout":
        """The layout of one of our runs at its full batch."""
        train = run.train
        return replace(
            cls.of_state(run.parallel, train.precision),
            seq_len=train.seq_len,
            micro_batch=train.micro_batch,
            num_micro_batches=num_micro_batches(run, train.global_batch),
            recompute=train.recompute,
        )

    @classmethod
    def of_state(cls, parallel: ParallelConfig, precision: Precision) -> "Layout":
        """A layout for what does not depend on the batch: weights, gradients, optimizer state."""
        return cls(
            tensor=parallel.tensor,
            sequence=parallel.sequence,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            expert=parallel.expert,
            expert_tensor=1,
            data=parallel.data,
            zero=parallel.zero,
            seq_len=1,
            micro_batch=1,
            num_micro_batches=1,
            precision=precision,
            recompute="none",
        )

    @property
    def world_size(self) -> int:
        """Ranks, one GPU each."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.data * self.num_micro_batches * self.micro_batch * self.seq_len


@dataclass(frozen=True, slots=True)
class Habits:
    """What a trainer does that neither model nor layout says."""

    attention: Literal["flash", "triton", "scores"]
    """flash: scores stay on chip.  triton: as well, in megagrok's own kernel, more slowly.  scores: in memory, one run
    of queries at a time (megagrok's soft-cap in torch). All make them again in the backward pass."""
    experts: Literal["grouped", "loop"]
    """Expert matmuls in one grouped kernel, or one after the other."""
    fused: bool
    """Element-wise work in fused kernels, not one torch call each."""
    graphs: bool
    """Kernels replayed from CUDA graphs: the host is never waited for."""
    dispatch: Literal["all_to_all", "fused"]
    """NCCL's all-to-all of rows, or a kernel that sends a token once per node (DeepEP, HybridEP)."""
    overlaps_tensor: bool
    overlaps_expert: bool
    overlaps_data: bool
    """Whether the messages over these ranks travel while matmuls run."""
    evens_stages: bool
    """Layers are placed so that the stage with the output head has fewer."""
    experts_in_fp8: bool
    """Under fp8 the experts too, not only the dense matrices."""
    reduces_whole: bool
    """Gradients are all-reduced though each rank needs only its shard of them."""
    routing: Literal["balanced", "natural"]
    dropped: float = 0.0
    """Share of the rows of experts that a capacity limit drops; 0 in a dropless trainer."""
    gradient_bytes: int = 4
    """Of one parameter, all copies that stay through the step: fp32 sums, and bf16 gradients that stay beside them."""
    gathers_aside: bool = False
    """Under ZeRO, updated weights are gathered in a buffer of their own before they are copied in."""
    moment_bytes: int = 8
    """Of one parameter: AdamW's two moments, fp32; some trainers keep them in bf16."""
    on_cpu: bool = False
    """Blocks as the kernels in torch size them on a CPU, where a rehearsal walks; the head's weight in fp32."""
    gather_buffers: int = 1
    """Under sequence parallelism, buffers that stay for gathering what the tensor ranks split: a whole micro-batch's
    hidden states each."""


MEGAGROK = Habits(
    attention="scores",
    experts="loop",
    fused=False,
    graphs=False,
    dispatch="all_to_all",
    overlaps_tensor=False,
    overlaps_expert=False,
    overlaps_data=False,
    evens_stages=False,
    experts_in_fp8=False,
    reduces_whole=True,
    routing="natural",
)
"""What the engine of this repository does today, with the kernels that `auto` means."""


def habits_of(kernels: KernelsConfig) -> Habits:
    """What the engine does with these kernels. Only the choice for attention is priced."""
    return replace(MEGAGROK, attention="triton") if kernels.attention == "triton" else MEGAGROK
