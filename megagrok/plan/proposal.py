"""The body of `megagrok plan`: from a file and a cluster to layouts and a bill. What it prints is in `proposal_text`.

Tokens per step stay those of the file, also at another sequence length: a layout must not change what is learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megagrok.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    decode_config,
    field_problems,
    is_model_file,
    load_model_config,
)
from megagrok.config.near import divisors
from megagrok.config.problems import placed, raise_problems
from megagrok.config.schema import Precision
from megagrok.errors import ConfigError, TopologyError
from megagrok.plan.batch import total_samples
from megagrok.plan.calibration import Calibration, read_calibration
from megagrok.plan.check import check
from megagrok.plan.describe import MODEL_FILE_SEQ_LEN
from megagrok.plan.estimate import Machine, StepSeconds
from megagrok.plan.gpus import GPUS, find_gpu
from megagrok.plan.price import Bill, bill
from megagrok.plan.search import Candidate, Found, fewest_that_fit, nearest_worlds, priced, search
from megagrok.plan.space import unalterable

MODEL_FILE_TOKENS = 2**24
"""Tokens per step for a model without a run: 16.8 M, with which configs/run/pretrain-286b.yaml begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked, in the words of the command line. Rates in dollars; None where nothing was said."""

    config: Path
    overrides: Sequence[str]
    gpus: int
    gpu: str | None
    gpus_per_node: int
    network_bandwidth: float | None
    """Bytes per second of one GPU's port, one direction."""
    seq_len: int | None
    precisions: Sequence[Precision]
    """Empty: that of the configuration."""
    tokens: int | None
    dollars_per_gpu_hour: float | None
    dollars_per_kilowatt_hour: float | None
    calibration: Path | None
    top: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """The answer. If nothing fits, `found.best` is empty, and `enough_gpus` and `larger_gpus` say what would help."""

    request: Request
    run: RunConfig
    """As in the file, but for --seq; its layout is not one of those found."""
    is_model_file: bool
    machine: Machine
    precisions: tuple[Precision, ...]
    found: Found
    own: Candidate | None
    """The layout of the file, where it is one for as many GPUs and `check` accepts it; it may not fit."""
    calibration: Calibration | None
    bill: Bill | None
    """Of the first of found.best; None if nothing fits or nothing says how many tokens."""
    enough_gpus: int | None
    larger_gpus: tuple[str, ...]


def propose(request: Request) -> Proposal:
    """Search the layouts of a run on a cluster.  Raises ConfigError, TopologyError or MachineError."""
    calibration = None if request.calibration is None else read_calibration(request.calibration)
    machine = _machine(request, calibration)
    run = with_seq_len(_run(request), request.seq_len)
    precisions = tuple(request.precisions) or (run.train.precision,)
    for precision in precisions:
        if not machine.gpu.peak(precision):
            raise ConfigError(
                f"--precision {precision}, needs FP8 units; {machine.gpu.name} has none. Fix: --precision bf16."
            )
    raise_problems(unalterable(run), str(request.config))

    def correct(seconds: StepSeconds) -> StepSeconds:
        return seconds if calibration is None else calibration.correct(seconds)

    found = search(run, request.gpus, machine, precisions, top=request.top, correct=correct)
    if not found.legal:
        raise _no_layout(run, request, precisions)
    return Proposal(
        request=request,
        run=run,
        is_model_file=is_model_file(request.config),
        machine=machine,
        precisions=precisions,
        found=found,
        own=None if is_model_file(request.config) or check(run, request.gpus) else priced(run, machine, correct),
        calibration=calibration,
        bill=_bill(request, run, machine, found),
        enough_gpus=None if found.best else fewest_that_fit(run, request.gpus, machine, precisions),
        larger_gpus=() if found.nearest is None else _gpus_that_hold(found.nearest.estimate.peak_bytes),
    )


def with_seq_len(run: RunConfig, seq_len: int | None) -> RunConfig:
    """`run` in sequences of `seq_len`, with as many tokens in each step as before, its ramp included."""
    train = run.train
    if seq_len is None or seq_len == train.seq_len:
        return run
    batches = [("train.global_batch", train.global_batch)]
    batches += [(f"train.batch_ramp.{i}.global_batch", stage.global_batch) for i, stage in enumerate(train.batch_ramp)]
    for key, batch in batches:
        if batch * train.seq_len % seq_len:
            nearest = ", ".join(str(length) for length in divisors(batch * train.seq_len, seq_len)[:3])
            raise ConfigError(
                f"--seq {seq_len}, needs a divisor of the {batch * train.seq_len:,} tokens of a step ({key} = {batch} "
                f"sequences of {train.seq_len}): tokens per step are kept. Nearest: {nearest}."
            )

    def samples(count: int) -> int:
        return -(-count * train.seq_len // seq_len)

    ramp = tuple(
        replace(stage, until_samples=samples(stage.until_samples), global_batch=samples(stage.global_batch))
        for stage in train.batch_ramp
    )
    changed = replace(
        train,
        seq_len=seq_len,
        global_batch=samples(train.global_batch),
        evaluate_samples=samples(train.evaluate_samples),
        batch_ramp=ramp,
    )
    return replace(run, train=changed)


def _machine(request: Request, calibration: Calibration | None) -> Machine:
    if calibration is not None:
        calibration.require_gpu(request.gpu)
        gpu = calibration.gpu
    elif request.gpu is None:
        raise ConfigError(f"plan needs --gpu, one of {', '.join(gpu.name for gpu in GPUS)}, or --calibration")
    else:
        gpu = find_gpu(request.gpu)
    per_node = request.gpus_per_node
    if request.gpus > per_node and request.gpus % per_node:
        below = request.gpus // per_node * per_node
        raise TopologyError(
            f"--gpus {request.gpus}, needs a multiple of --nodes-of ({per_node}): a node is taken whole. "
            f"Nearest: {below} or {below + per_node}."
        )
    network = gpu.network_bandwidth if request.network_bandwidth is None else request.network_bandwidth
    return Machine(gpu, min(per_node, request.gpus), network)


def _run(request: Request) -> RunConfig:
    if is_model_file(request.config):
        return _run_of_model(load_model_config(request.config, request.overrides), request.config.stem)
    loaded = decode_config(request.config, request.overrides)
    raise_problems(placed(field_problems(loaded.config), loaded.provenance), str(request.config))
    return loaded.config


def _run_of_model(model: ModelConfig, name: str) -> RunConfig:
    """Settings that decide the cost are written out; the others are needed to make a run and read by no formula."""
    seq_len = min(model.max_positions, MODEL_FILE_SEQ_LEN)
    return RunConfig(
        name=name,
        model=model,
        train=TrainConfig(
            seq_len=seq_len,
            global_batch=max(1, MODEL_FILE_TOKENS // seq_len),
            micro_batch=1,
            precision="bf16",
            steps=1,
            evaluate_every_steps=1,
            evaluate_samples=1,
        ),
        optimizer=OptimizerConfig(lr=1e-4),
        checkpoint=CheckpointConfig(every_steps=1),
    )


def _no_layout(run: RunConfig, request: Request, precisions: Sequence[Precision]) -> TopologyError:
    near = nearest_worlds(run, request.gpus, request.gpus_per_node, precisions)
    advice = (
        f"Nearest that have one: {' or '.join(map(str, near))} GPUs." if near else "No other number near it has one."
    )
    model = run.model
    return TopologyError(
        f"--gpus {request.gpus}: no layout divides {model.num_layers} layers, {model.num_kv_heads} key and value heads,"
        f" {model.moe.num_experts} experts and {run.train.global_batch} sequences a step over them. {advice}"
    )


def _bill(request: Request, run: RunConfig, machine: Machine, found: Found) -> Bill | None:
    tokens = request.tokens
    if tokens is None and not is_model_file(request.config):
        tokens = total_samples(run.train) * run.train.seq_len
    if tokens is None or not found.best:
        return None
    return bill(
        machine.gpu,
        request.gpus,
        tokens,
        found.best[0].estimate.tokens_per_second,
        request.dollars_per_gpu_hour,
        request.dollars_per_kilowatt_hour,
    )


def _gpus_that_hold(peak_bytes: int) -> tuple[str, ...]:
    return tuple(gpu.name for gpu in GPUS if gpu.memory_bytes >= peak_bytes)
