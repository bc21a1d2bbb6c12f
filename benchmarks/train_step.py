"""Tokens per second of the training step beside its peers: same sizes, same layout, same batches, one run.

    python benchmarks/train_step.py [CONFIG] [KEY=VALUE ...] [--repeats N] [--json docs/bench/train_step.json]

All contenders live in the same forked ranks and take turns, one step each, in an order that rotates; so a slow moment
of the machine hits all alike, and a ratio is taken between steps of the same round. Contender by contender: see
contenders.py and megatron_gpt.py. CPU only. Not a measure of data loading, evaluation or checkpoints.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import platform as machine
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from page import relative, write_page

from megagrok.config import RunConfig, decode_config
from megagrok.errors import ConfigError, MegagrokError
from megagrok.plan import require_runnable

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Race, print the table, write the results."""
    options = _parse()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    try:
        loaded = decode_config(options.config, options.overrides)
        require_runnable(loaded)
        run = loaded.config
        _refuse_what_a_peer_cannot_do(run)
        # Only now: Megatron and DeepSpeed take seconds, and complain about missing GPU libraries, to be imported.
        from race import measure

        results = measure(run, options.repeats)
    except MegagrokError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    record = {
        "config": relative(options.config),
        "overrides": options.overrides,
        "repeats": options.repeats,
        **describe_machine(load_before),
        "shapes": describe_shapes(run),
        "contenders": [asdict(result) for result in results],
    }
    for result in results:
        print(
            f"{result.name:24} {result.tokens_per_second.median:8.0f} tokens/s, "
            f"megagrok / it = {result.ratio.median:.2f} ({result.ratio.min:.2f} to {result.ratio.max:.2f}), "
            f"CPU {result.cpu_seconds_per_step.median:.2f} s a step ({result.cpu_ratio.median:.2f} of megagrok's)"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_page(record, options.json.with_suffix(".md"))
    return 0


def _refuse_what_a_peer_cannot_do(run: RunConfig) -> None:
    """Raises ConfigError with every setting that one of the peers has no counterpart of, as they are run here."""
    model, parallel = run.model, run.parallel
    refused = {
        "model.tied_embeddings": model.tied_embeddings,
        "model.moe.residual_ffn_hidden": model.moe.residual_ffn_hidden is not None,
        "parallel.context": parallel.context > 1,
        "parallel.virtual_pipeline": parallel.virtual_pipeline > 1,
        "parallel.tensor without parallel.sequence": parallel.tensor > 1 and not parallel.sequence,
        "train.precision": run.train.precision != "fp32",
    }
    if any(refused.values()):
        settings = ", ".join(setting for setting, is_refused in refused.items() if is_refused)
        raise ConfigError(f"the peers of this benchmark do not run {settings}; leave it at its default")


def describe_shapes(run: RunConfig) -> dict[str, object]:
    """Sizes that decide the cost of a step."""
    model, train, parallel = run.model, run.train, run.parallel
    return {
        "hidden": model.hidden,
        "layers": model.num_layers,
        "heads": f"{model.num_heads} query, {model.num_kv_heads} key-value, width {model.head_dim}",
        "experts": f"{model.moe.num_experts}, top {model.moe.top_k}, width {model.moe.ffn_hidden}",
        "vocabulary": model.vocab_size,
        "batch": f"{train.global_batch} samples of {train.seq_len} tokens, micro-batches of {train.micro_batch}",
        "layout": (
            f"tensor {parallel.tensor}{' with sequence parallelism' if parallel.sequence else ''}, "
            f"pipeline {parallel.pipeline}, data {parallel.data}, experts over {parallel.expert}, ZeRO {parallel.zero}"
        ),
        "precision": train.precision,
    }


def describe_machine(load_before: float) -> dict[str, object]:
    """Device, versions, commit, and how busy others kept the machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "device": f"CPU, {machine.machine()}, {_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{len(os.sched_getaffinity(0))} cores, 1 thread a rank, gloo",
        "versions": {"python": machine.python_version(), **versions},
        # Of the minute before the race: above a fraction of the cores, trust the CPU seconds more than the clock.
        "load_before": f"{load_before:.1f}",
        "commit": described.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown model"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs/run/quickstart.yaml", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="timed rounds, after two to warm up")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here, and a page beside it (.md)")
    options = parser.parse_intermixed_args()
    if options.repeats < 1:
        parser.error("--repeats needs at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
