"""The settings of a run: one frozen dataclass per noun. No arithmetic, no files, no torch.

A field's docstring stands below it and is what `megagrok explain KEY` prints. A field without a default has no value
that is right for everyone. Ranges that one field can break are checked in `checks.py` beside this file; what several
fields break together (topology, divisibility, memory) in `megagrok.plan.check`.
"""

from dataclasses import dataclass, field
from typing import Literal

BalanceLoss = Literal["none", "micro_batch", "global_batch"]
NonFinitePolicy = Literal["stop", "skip", "rewind"]
SpikePolicy = Literal["ignore", "stop", "skip", "rewind"]
Precision = Literal["fp32", "bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]
ScheduleKind = Literal["constant", "wsd", "cosine"]
Kernel = Literal["auto", "torch", "triton"]
ExpertsKernel = Literal["auto", "torch", "grouped_mm", "triton"]
SourceKind = Literal["python_stdlib", "text", "jsonl", "parquet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts layer; every layer of the model has one."""

    num_experts: int
    """Experts in a layer, over all ranks."""
    top_k: int
    """Experts that each token visits."""
    ffn_hidden: int
    """Inner width of one expert."""
    residual_ffn_hidden: int | None = None
    """Inner width of a dense MLP beside the experts (Grok-2: (MLP + MoE) / sqrt 2); null has none."""
    router_softcap: float | None = None
    """Router logits become cap * tanh(logits / cap); null leaves them as they are."""
    renormalize_top_k: bool = False
    """Divide the weights of a token's chosen experts by their sum. xAI's own code does not."""
    balance_loss: BalanceLoss = "global_batch"
    """Over which tokens an expert's load is measured: each micro-batch, or the whole previous step's global batch."""
    balance_coefficient: float = 1.0e-2
    """Weight of the load-balancing loss."""
    z_loss_coefficient: float = 1.0e-3
    """Weight of the router z-loss, the mean of logsumexp(router logits) squared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture. Symbols follow the published Grok code; see model/reference.py for the maths."""

    vocab_size: int
    """Rows of the embedding table; at least the tokenizer's size, a multiple of parallel.tensor."""
    hidden: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head."""
    max_positions: int
    """Longest sequence that the model is meant for."""
    moe: MoEConfig
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""
    norm_eps: float = 1.0e-5
    """Added to the mean square inside RMSNorm."""
    embedding_multiplier: float = 1.0
    """Scales the embedding output; Grok uses sqrt(hidden)."""
    output_multiplier: float = 1.0
    """Scales the logits before the final soft-cap."""
    attention_softcap: float | None = 30.0
    """Attention logits become cap * tanh(logits / cap) before the mask; null leaves them as they are."""
    attention_temperature_positions: int | None = None
    """Beyond this query position n, logits are scaled by log2(position) / log2(n); null switches it off."""
    final_softcap: float | None = None
    """Output logits become cap * tanh(logits / cap); null leaves them as they are."""
    tied_embeddings: bool = False
    """Use the embedding table as the output head too."""
    init_std: float = 0.02
    """Standard deviation of every weight; projections back into the residual stream get / sqrt(2 * num_layers)."""
    dropout: float = 0.0
    """Share of the values that a sub-layer adds to the residual stream that training drops, in steps of 1/65536."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model and the batch are spread. World size = tensor * context * pipeline * data."""

    tensor: int = 1
    """Ranks that split each weight matrix (Megatron-core TP)."""
    sequence: bool = False
    """Split activations between the matrices along the sequence over the tensor ranks (Megatron-core SP)."""
    pipeline: int = 1
    """Pipeline stages (Megatron-core PP)."""
    virtual_pipeline: int = 1
    """Model chunks per stage, interleaved when above 1."""
    context: int = 1
    """Ranks that split each sequence for attention (CP)."""
    expert: int = 1
    """Ranks that share out the experts (DeepSpeed EP): consecutive ranks, tensor ranks first, then data ranks."""
    data: int = 1
    """Replicas of the model, each with its own part of the batch."""
    zero: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO stage: 0 keeps all, 1 shards optimizer state, 2 the reduced gradients too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStage:
    """One step of the batch-size ramp."""

    until_samples: int
    """The stage holds while fewer samples than this have been consumed."""
    global_batch: int
    """Samples per optimizer step in this stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run: how long, how much at a time, in which precision."""

    seed: int = 1234
    """Decides initial weights and sample order, together with names; never with ranks."""
    steps: int
    """Optimizer steps of the whole run."""
    seq_len: int
    """Tokens per sample."""
    global_batch: int
    """Samples per optimizer step, over all ranks, after the ramp."""
    micro_batch: int
    """Samples per rank that go through the model at once."""
    batch_ramp: tuple[BatchStage, ...] = ()
    """Smaller global batches at the start, in order of until_samples; empty for none."""
    precision: Precision = "fp32"
    """bf16 keeps fp32 master weights and fp32 gradients; fp8 is Transformer Engine's, on Hopper or newer."""
    recompute: Recompute = "none"
    """Activations recomputed in the backward pass: none, the attention core (selective), or whole layers (full)."""
    deterministic: bool = False
    """Refuse any operation without a deterministic implementation."""
    evaluate_every_steps: int
    """Held-out loss is measured every so many steps, and at the end."""
    evaluate_samples: int
    """Held-out samples per evaluation; a multiple of micro_batch * data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW; norms and biases are not decayed."""

    lr: float
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1.0e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it. 0 never clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps: warm-up, then constant, warm-up-stable-decay, or cosine."""

    kind: ScheduleKind = "wsd"
    """constant stays at the peak; wsd decays over the last decay_steps; cosine decays from the end of the warm-up."""
    warmup_steps: int = 0
    """Steps of linear growth from 0 to the peak."""
    decay_steps: int = 0
    """Length of the decay of wsd; the other kinds do not read it."""
    min_lr: float = 0.0
    """Learning rate at the last step of the decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One body of documents."""

    kind: SourceKind
    """python_stdlib is the text every CPython has; the others are read through Hugging Face datasets."""
    path: str | None = None
    """File, folder or glob; python_stdlib takes none."""
    text_field: str = "text"
    """Column or key that holds a document's text (jsonl, parquet)."""
    max_bytes: int | None = None
    """Stop after the documents that make up this much text; null reads all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """From documents to samples. Either sources (text, tokenized once into the cache) or tokens (ready .bin/.idx)."""

    cache: str = "runs/cache"
    """Folder for prepared token files; shared by runs with the same sources and tokenizer."""
    sources: tuple[SourceConfig, ...] = ()
    """Bodies of text to tokenize."""
    tokens: str | None = None
    """Prefix of a Megatron .bin/.idx pair that is already tokenized; excludes sources."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; null trains a BPE of vocab_size tokens on the sources."""
    tokenizer_vocab_size: int | None = None
    """Size of the BPE to train; only with tokenizer: null."""
    held_out_fraction: float = 0.02
    """Share of the documents, chosen by a hash of their text, that is never trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When state is written and how much of it is kept."""

    every_steps: int
    """Save every so many steps, and at the end."""
    keep: int = 2
    """Newest complete checkpoints that are kept; at least 2, so that a bad newest one does not end the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """How long a rank may be silent before its launcher takes it for hung, writes down every stack and ends the run."""

    start_seconds: float = 1800.0
    """While it builds its part of the model and meets its peers."""
    load_seconds: float = 3600.0
    """While it reads a checkpoint."""
    step_seconds: float = 600.0
    """In one step of training."""
    evaluate_seconds: float = 600.0
    """In one batch of an evaluation."""
    save_seconds: float = 1800.0
    """While a step is held for a save, or waits for the end of the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What becomes of a step that should not be learnt from. All ranks decide alike, before weights move; the step's
    samples and documents go to bad/STEP.json, and `megagrok replay RUN STEP` makes it again."""

    on_nonfinite: NonFinitePolicy = "stop"
    """Loss or gradient is not finite: stop; skip the update and go on; or rewind to the newest checkpoint and leave
    the step's samples out."""
    on_spike: SpikePolicy = "ignore"
    """Loss or gradient norm spikes: as for on_nonfinite, or ignore it, which saves computing the norm twice."""
    spike_sigmas: float = 6.0
    """A spike is more than so many standard deviations above the mean of the last window_steps good steps."""
    window_steps: int = 128
    """Good steps that are looked back at; nothing is a spike before there is a quarter of them."""
    max_in_a_row: int = 3
    """The run stops, with exit status 70, at one bad step more than this without a good one between."""
    replica_check_every_steps: int = 100
    """Every so many steps, and before each save, ranks that hold the same weights compare hashes of them; 0 never. One
    check takes 2 % of a step of the tiny model and of the quickstart (measured on 2 CPU cores), 0.02 % at every 100.
    Under ZeRO an update writes over the weights, so only a fault in a checked step is seen, and none in its shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig:
    """Which implementation of an operation runs, looked at once when the model is built. All compute the same."""

    attention: Kernel = "auto"
    """Soft-capped causal attention. auto, here and below: the fastest that was measured on such a device."""
    cross_entropy: Kernel = "auto"
    """Output head, final soft-cap and loss; logits never exist whole."""
    experts: ExpertsKernel = "auto"
    """The experts' gated MLPs; grouped_mm is torch's grouped matrix product."""
    norm: Kernel = "auto"
    """RMSNorm, and the residual sum after it."""
    permute: Kernel = "auto"
    """Rows into the order of their experts, and back."""
    router: Kernel = "auto"
    """Soft-cap, softmax, choice of experts and what the router is charged for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """What is written down, and how often."""

    log_every_steps: int = 1
    """Steps between two lines of metrics.jsonl and two points in W&B."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases through its own client; offline writes a run that `wandb sync` uploads later."""
    wandb_project: str = "megagrok"
    """W&B project name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run. Written, resolved, into every checkpoint."""

    name: str
    """Name of the run; its files go to runs_dir/name."""
    runs_dir: str = "runs"
    """Folder that holds the runs."""
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
