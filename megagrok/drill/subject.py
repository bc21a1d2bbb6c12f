"""The run that is drilled: small, and with everything that a restart could get wrong.

Experts on several ranks, sharded moments, dropout, a batch that grows, several micro-batches a step, a balance loss
over the step before, saves in the background every few steps.
"""

from pathlib import Path

from megagrok.config import RunConfig
from megagrok.config.schema import (
    BatchStage,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
    WatchConfig,
)

NUM_RANKS = 2
SAVE_EVERY_STEPS = 4
# A rank that is stopped is silent for this long before it is taken for hung.
HANG_SECONDS = 6.0


def make_subject(folder: Path, name: str, *, steps: int) -> RunConfig:
    """The run `name` of so many steps, in folder/name; all of a drill share the prepared data in folder/cache."""
    model = ModelConfig(
        vocab_size=512,
        hidden=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=64,
        init_std=0.1,
        final_softcap=50.0,
        dropout=0.1,
        moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=64, router_softcap=30.0),
    )
    return RunConfig(
        name=name,
        runs_dir=str(folder),
        model=model,
        train=TrainConfig(
            steps=steps,
            seq_len=32,
            global_batch=8,
            micro_batch=2,
            batch_ramp=(BatchStage(until_samples=24, global_batch=4),),
            evaluate_every_steps=steps,
            evaluate_samples=4,
        ),
        optimizer=OptimizerConfig(lr=1.0e-2, eps=1.0e-5),
        schedule=ScheduleConfig(warmup_steps=2),
        parallel=ParallelConfig(data=NUM_RANKS, expert=NUM_RANKS, zero=1),
        data=DataConfig(
            cache=str(folder / "cache"),
            sources=(SourceConfig(kind="python_stdlib", max_bytes=400_000),),
            tokenizer_vocab_size=512,
            held_out_fraction=0.1,
        ),
        checkpoint=CheckpointConfig(every_steps=SAVE_EVERY_STEPS, keep=3),
        telemetry=TelemetryConfig(wandb="off"),
        watch=WatchConfig(step_seconds=HANG_SECONDS, evaluate_seconds=HANG_SECONDS, save_seconds=HANG_SECONDS),
    )
