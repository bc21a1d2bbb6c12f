"""Published training runs in the planner's words: a row of a CSV -> shape, layout, habits, machine, tokens per second.

Nothing here looks a model up: what a row does not say is inferred from its own numbers, by the rules below, or the row
is incomplete, with the reason. Nothing here knows a prediction: `tag` marks rows by what was published alone.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from megagrok.plan.cost import Machine
from megagrok.plan.flops import matmul_params_per_token
from megagrok.plan.gpus import find_gpu
from megagrok.plan.shape import Habits, Layout, Shape

RUNS = Path(__file__).parent.parent / "docs/plan/published-runs.csv"
GPUS = {"H100-80GB": "h100", "H800-80GB": "h800"}
"""The column gpu_type, where the device is one of the planner's and as it was sold (not capped, not HBM2e)."""
FEW_EXPERTS = 16
TWIN = 1.25
"""The same job published so many times as fast elsewhere."""
COLLAPSE = 1.7
"""Tokens per second and GPU lost within a series of best layouts."""
DROPPED = 0.10
"""Of the rows of experts, with a capacity factor of 1: what each expert gets beyond an even share. Assumed."""


class Incomplete(Exception):
    """What the row does not say."""


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """One complete row."""

    line: int
    source: str
    model: str
    notes: str
    shape: Shape
    layout: Layout
    machine: Machine
    habits: Habits
    tokens_per_second: float
    """Per GPU, as published."""
    allocated_bytes: float | None
    tag: str = ""
    """Why no planner can be held to this row; empty: it is held to it."""

    @property
    def families(self) -> tuple[str, ...]:
        """Of the validation's table; a run may be in several."""
        names = [
            "dense" if not self.shape.experts else "coarse MoE" if self.shape.experts <= FEW_EXPERTS else "fine MoE"
        ]
        names += ["FP8"] if self.layout.precision == "fp8" else ["BF16"]
        names += ["natural routing"] if self.habits.routing == "natural" else []
        names += ["FSDP"] if self.layout.zero == 3 else []
        names += ["H800"] if self.machine.gpu.name == "h800" else []
        return tuple(names)

    @property
    def title(self) -> str:
        """Model, GPUs and layout in a few words."""
        at = self.layout
        parts = [f"T{at.tensor}", f"P{at.pipeline}"]
        parts += [f"V{at.virtual_pipeline}"] if at.virtual_pipeline > 1 else []
        parts += [f"E{at.expert}"] if self.shape.experts else []
        parts += [f"C{at.context}"] if at.context > 1 else []
        return f"{self.model}, {at.world_size} GPUs, {' '.join(parts)} D{at.data}, {at.precision}"


def load_runs(path: Path = RUNS) -> tuple[list[PublishedRun], dict[int, str]]:
    """The complete runs of a CSV with the columns of docs/plan/published-runs.csv, and why each other line is not."""
    runs, incomplete, notes = [], {}, ""
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            # "same, ..." goes on with the notes of the row above.
            notes = f"{notes} {row['notes']}" if row["notes"].startswith("same") else row["notes"]
            try:
                runs.append(_run(line, {**row, "notes": notes}))
            except Incomplete as reason:
                incomplete[line] = str(reason)
    return _tagged(runs), incomplete


def _run(line: int, row: dict[str, str]) -> PublishedRun:
    gpu_name = next((name for text, name in GPUS.items() if row["gpu_type"] == text), None)
    if gpu_name is None:
        raise Incomplete(f"GPU {row['gpu_type']}")
    if not row["tokens_per_s_per_gpu"]:
        raise Incomplete("no tokens per second")
    gpu, shape = find_gpu(gpu_name), _shape(row)
    memory = row["memory_per_gpu_GB"]
    return PublishedRun(
        line=line,
        source=row["source"],
        model=row["model"],
        notes=row["notes"],
        shape=shape,
        layout=_layout(row, shape),
        machine=Machine(gpu, 8, gpu.network_bandwidth),
        habits=_habits(row),
        tokens_per_second=float(row["tokens_per_s_per_gpu"]),
        allocated_bytes=float(memory) * 1e9 if memory else None,
    )


def _number(row: dict[str, str], *columns: str) -> list[int]:
    try:
        return [int(float(row[column])) for column in columns]
    except ValueError as error:
        raise Incomplete(f"one of {', '.join(columns)}") from error


def _shape(row: dict[str, str]) -> Shape:
    layers, hidden, ffn, heads, kv_heads, head_dim, vocab = _number(
        row, "layers", "hidden", "ffn_or_moe_ffn", "heads", "kv_heads", "head_dim", "vocab"
    )
    experts, top_k, shared = (int(row[column] or 0) for column in ("experts", "topk", "shared_expert_ffn"))
    if "hybrid" in row["model"] + row["notes"]:
        raise Incomplete("layers of other kinds than attention and MLP")
    total = float(row["total_params_B"]) * 1e9
    active = float(row["active_params_B"] or row["total_params_B"]) * 1e9
    shape = Shape(
        layers=layers,
        dense_layers=0 if experts else layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_params=2 * hidden * (heads + kv_heads) * head_dim,
        dense_ffn=0 if experts else ffn,
        expert_ffn=ffn if experts else 0,
        experts=experts,
        top_k=top_k,
        shared_ffn=shared,
        ffn_matrices=3,
        vocab=vocab,
        tied=False,
    )
    # Gated or not, two tables or one: whichever comes nearest to the published parameters; between equals, this order.
    # Not so where experts are: their first layers are often dense, which no column says, and outweigh a table.
    tables = (False,) if experts else (False, True)
    choices = [replace(shape, ffn_matrices=matrices, tied=tied) for matrices in (3, 2) for tied in tables]
    shape = min(choices, key=lambda shape: round(abs(_total_params(shape) - total) / 1e7))
    counted = matmul_params_per_token(shape) + vocab * hidden
    if counted > 1.15 * active and experts:
        # Latent attention: its projections are what the published active parameters leave for them.
        rest = active - (counted - layers * shape.attention_params)
        shape = replace(shape, attention_params=int(rest / layers))
    elif not experts and abs(_total_params(shape) / total - 1) > 0.2:
        raise Incomplete("its columns do not add up to its parameters")
    return shape


def _total_params(shape: Shape) -> float:
    mlp = shape.ffn_matrices * shape.hidden
    width = shape.shared_ffn + shape.experts * shape.expert_ffn if shape.experts else shape.dense_ffn
    return shape.layers * (shape.attention_params + mlp * width) + (1 if shape.tied else 2) * shape.vocab * shape.hidden


def _layout(row: dict[str, str], shape: Shape) -> Layout:
    gpus, tensor, pipeline = _number(row, "gpus", "TP", "PP")
    micro_batch, global_batch, seq_len = _number(row, "micro_batch", "global_batch", "seq_len")
    context = int(row["CP"] or 1)
    data = gpus // (tensor * pipeline * context)
    stage = tensor * context * data
    # Unsaid: experts are spread as far as they go; Megatron splits them over the tensor ranks unless it folds.
    expert = int(row["EP"] or min(stage, shape.experts)) if shape.experts else 1
    expert_tensor = 1
    if shape.experts:
        expert_tensor = int(row["ETP"] or (tensor if row["zero_or_distopt"] == "dist-opt" else 1))
        expert_tensor = max(1, min(expert_tensor, stage // expert))
    sharding = row["zero_or_distopt"]
    stages = {"ZeRO-0": 0, "ZeRO-1": 1, "dist-opt": 1, "ZeRO-2": 2, "FSDP SHARD_GRAD_OP": 2}
    if global_batch % (data * micro_batch):
        raise Incomplete("a batch that does not divide over its ranks")
    return Layout(
        tensor=tensor,
        sequence=tensor > 1,
        pipeline=pipeline,
        virtual_pipeline=_chunks(row, shape, pipeline),
        context=context,
        expert=expert,
        expert_tensor=expert_tensor,
        data=data,
        zero=next((zero for name, zero in stages.items() if sharding == name), 3),
        seq_len=seq_len,
        micro_batch=micro_batch,
        num_micro_batches=global_batch // (data * micro_batch),
        precision="fp8" if "FP8" in row["precision"] else "bf16",
        recompute="full" if row["recompute"].startswith("full") else "none",
    )


def _chunks(row: dict[str, str], shape: Shape, pipeline: int) -> int:
    """Interleaving that is not stated: none in Megatron-Bridge, whose recipes name it where they have it, and nanotron;
    elsewhere as fine as Megatron can, up to 12, for these are tuned runs."""
    if row["VP"].isdecimal():
        return int(row["VP"])
    if pipeline == 1 or "OneForwardOneBackward" in row["notes"] or "Megatron-Bridge" in row["source"]:
        return 1
    layers = -(-shape.layers // pipeline)
    return max(chunks for chunks in range(1, 13) if layers % chunks == 0)


def _habits(row: dict[str, str]) -> Habits:
    """What its notes and its software say a trainer does: no row and no model has habits of its own."""
    notes, sharding = row["notes"], row["zero_or_distopt"]
    is_nanotron = "OneForwardOneBackward" in notes
    is_bridge = "Megatron-Bridge" in row["source"]
    plain_exchange = "NCCL" in notes or "OFF" in notes
    tuned = (is_bridge and not plain_exchange) or row["VP"] == "DualPipe"
    return Habits(
        attention="flash",
        experts="grouped",
        # nanotron and torch's FSDP1 call torch operation by operation.
        fused=not is_nanotron and not sharding.startswith("FSDP ") and "eager" not in row["precision"],
        graphs="CUDA graphs" in notes or "canonical" in notes,
        dispatch="fused" if tuned or (re.search("DeepEP|HybridEP", notes) and "NCCL" not in notes) else "all_to_all",
        overlaps_tensor=is_bridge
        or "async=True" in notes
        or re.search("NeMo|NVIDIA/Megatron-LM", row["source"]) is not None,
        overlaps_expert=tuned or "EP overlap ON" in notes,
        overlaps_data=not is_nanotron or sharding == "ZeRO-0",
        evens_stages=is_nanotron,
        experts_in_fp8=True,
        reduces_whole=False,
        dropped=DROPPED if "token-drop" in notes or "tokendrop" in notes else 0.0,
        routing="natural" if re.search("natural routing", notes, re.IGNORECASE) else "balanced",
    )


def _tagged(runs: list[PublishedRun]) -> list[PublishedRun]:
    return [replace(run, tag=_tag(run, runs)) for run in runs]


def _tag(run: PublishedRun, runs: Iterable[PublishedRun]) -> str:
    if run.machine.gpu.name != "h100":
        return "another GPU: no constant is fitted to it"
    if re.search("functional|not tuned|untuned", run.notes):
        return "its source calls it functional or untuned"
    if run.layout.tensor > run.machine.gpus_per_node:
        return "tensor ranks over several nodes"
    if run.shape.experts and run.layout.expert == 1 and run.layout.zero == 3:
        return "every expert gathered by FSDP for every micro-batch"
    if any(_is_same_job(run, other) and other.tokens_per_second > TWIN * run.tokens_per_second for other in runs):
        return f"the same job was published more than {TWIN} times as fast"
    if "best of that model" in run.notes and any(_shows_collapse(run, other) for other in runs):
        return f"lost a factor {COLLAPSE} within its own series of best layouts"
    return ""


def _is_same_job(run: PublishedRun, other: PublishedRun) -> bool:
    def job(run: PublishedRun) -> tuple[object, ...]:
        at = run.layout
        what = (run.shape, run.habits.dispatch, run.habits.routing, run.habits.graphs)
        return (*what, at.tensor, at.pipeline, at.context, at.expert, at.data, at.seq_len, at.precision)

    # A trainer that drops rows does less: if it is the slower one all the same, it is the same job and more.
    return job(run) == job(other) and other.habits.dropped <= run.habits.dropped


def _shows_collapse(run: PublishedRun, other: PublishedRun) -> bool:
    """Another run of the series, on a quarter to four times the GPUs, is that much faster per GPU."""
    factor = other.layout.world_size / run.layout.world_size
    same = (run.source, run.model) == (other.source, other.model)
    return same and 0.25 <= factor <= 4 and other.tokens_per_second > COLLAPSE * run.tokens_per_second
