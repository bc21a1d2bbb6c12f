"""Typed, frozen, validated settings: loading, overrides, provenance, explanations. No torch, no arithmetic of a run."""

from megagrok.config.checks import field_problems
from megagrok.config.decode import from_dict, to_dict
from megagrok.config.explain import Explanation, explain, reference
from megagrok.config.load import Loaded, decode_config, is_model_file, load_config, load_model_config
from megagrok.config.problems import Fix, Problem, placed, raise_problems
from megagrok.config.schema import (
    BatchStage,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
)

__all__ = [
    "BatchStage",
    "CheckpointConfig",
    "DataConfig",
    "Explanation",
    "Fix",
    "Loaded",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Problem",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TelemetryConfig",
    "TrainConfig",
    "decode_config",
    "explain",
    "field_problems",
    "from_dict",
    "is_model_file",
    "load_config",
    "load_model_config",
    "placed",
    "raise_problems",
    "reference",
    "to_dict",
]
