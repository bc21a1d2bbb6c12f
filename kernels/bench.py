"""`python -m megagrok.kernels.bench --all --json OUT`: every operation against its peers and against the machine.

An operation is timed only if its tests are green, now, on this machine. Everything that the page says is in the JSON
file; `--page` writes it as tables. Eight minutes on one H100, five on two cores; nothing is downloaded.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform as this_machine
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megagrok.errors import KernelError
from megagrok.kernels.bench_cases import FLOORS, OPS, OURS, Field, fields, needs
from megagrok.kernels.bench_page import render
from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.peers import LAYERS
from megagrok.kernels.roofline import Roofline, measure_roofline
from megagrok.kernels.timing import Race, race
from megagrok.platform import Platform, find_platform

ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = (
    "torch", "triton", "deepspeed", "megatron-core", "transformers", "transformer-engine", "flash-attn", "liger-kernel",
    "sonic-moe",
)  # fmt: skip
_BUDGET_SECONDS = {"cpu": 16.0, "cuda": 3.0}
"""Of rounds for one case; three rounds are run in any case."""

JSON = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if an operation was red or an implementation of ours failed; 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m megagrok.kernels.bench", description=__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--all", action="store_true", help="every operation")
    chosen.add_argument("--ops", nargs="+", choices=OPS, help="these operations")
    parser.add_argument("--json", type=Path, required=True, help="where all figures go")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU; all by default")
    parser.add_argument("--page", type=Path, help="where they go as tables")
    options = parser.parse_args(arguments)

    platform = find_platform()
    if not platform.is_cuda:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    record = describe_machine(platform)
    # The tests of one operation after the other, all before the first clock starts.
    ops = OPS if options.all else tuple(options.ops)
    red = {folder: why for folder in _folders(ops) if (why := why_red(folder, platform)) is not None}
    roofline = measure_roofline(platform)
    record["roofline"] = {
        "flops_per_second": roofline.flops_per_second,
        "bytes_per_second": roofline.bytes_per_second,
    }
    record["refused"], record["cases"] = {}, []
    for op in ops:
        refusals = [f"kernels/{folder}: {red[folder]}" for folder in needs(op) if folder in red]
        if refusals:
            record["refused"][op] = "; ".join(refusals)
            continue
        try:
            found = fields(op, platform.device)
        except KernelError as error:
            record["refused"][op] = str(error)
            continue
        record["cases"] += [time_field(field, platform, roofline) for field in found]
    record["seconds"] = round(time.perf_counter() - start)
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = render(record)
    if options.page is not None:
        options.page.write_text(page, encoding="utf-8")
    print(page)
    return 1 if record["refused"] or any(case["broken"] for case in record["cases"]) else 0


def why_red(folder: str, platform: Platform) -> str | None:
    """The last words of a folder's tests if they failed or there are none; None if they passed."""
    tiers = "not slow and not multi_gpu" if platform.is_cuda else "not slow and not gpu and not multi_gpu"
    tests = ROOT / "kernels" / folder
    if not list(tests.glob("test_*.py")):
        return "it has no tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tiers, str(tests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    words = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"its tests are red: {words[0] if words else (done.stdout + done.stderr).strip()[-200:]}"


def time_field(field: Field, platform: Platform, roofline: Roofline) -> JSON:
    """Race one case and write down all that the table shows of it."""
    case = field.case
    print(f"{case.op}: {case.shape}", file=sys.stderr, flush=True)
    result = race(case, platform, budget_seconds=_BUDGET_SECONDS[platform.device.type], may_fail=frozenset(case.makes))
    written = _written(result, roofline, field.absent)
    # What a case held lies in cycles of modules and closures.
    del result
    gc.collect()
    return written


def _written(result: Race, roofline: Roofline, absent: dict[str, str]) -> JSON:
    case, timings = result.case, result.timings
    peers = [name for name in timings if kind(name) == "peer"]
    best = min(peers, key=lambda name: timings[name].median, default=None)
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "name": name,
                "kind": kind(name),
                "seconds": list(timing.seconds),
                "median_seconds": timing.median,
                "share_of_roofline": roofline.seconds(case) / timing.median,
                "times_as_fast_as_best_peer": None if best is None else result.ratio(name, best),
                "saved_bytes": timing.saved_bytes,
            }
        )
    return {
        "op": case.op,
        "shape": case.shape,
        "flops": case.flops,
        "bytes": case.bytes,
        "best_peer": best,
        "rows": rows,
        "absent": absent | {name: why for name, why in result.failed.items() if kind(name) == "peer"},
        "broken": {name: why for name, why in result.failed.items() if kind(name) != "peer"},
    }


def kind(name: str) -> str:
    """Whose it is: "ours" by the name of an implementation, "floor", or "peer"."""
    if name in FLOORS:
        return "floor"
    own = {"reference"}.union(*IMPLEMENTATIONS.values())
    return "ours" if name in own or name.partition(",")[0] == OURS else "peer"


def describe_machine(platform: Platform) -> JSON:
    """What the figures mean nothing without."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": this_machine.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": platform.describe() if platform.is_cuda else _cpu(),
        "precision": "bf16" if platform.is_cuda else "fp32",
        "versions": versions,
        "commit": commit or "unknown",
        "load_before": round(os.getloadavg()[0], 1),
        "layer_peers": {name: peer.differs for name, peer in LAYERS.items()},
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else this_machine.machine()
    return f"CPU, {name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _folders(ops: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(folder for op in ops for folder in needs(op)))


if __name__ == "__main__":
    sys.exit(main())
