"""Saving the same state beside torch.distributed.checkpoint: how long a step is held, how long until it is on the disk.

    python benchmarks/checkpoint.py [--megabytes N] [--rounds N] [--folder DIR] [--json docs/bench/checkpoint.json]

All contenders live in the same forked ranks, hold the same tensors and take turns, one save each, in an order that
rotates; so a slow moment of the machine hits all alike, and a ratio is between saves of the same round. The folder
should lie on the disk that matters: by default the one of the current directory. CPU tensors only: what a copy from a
GPU costs is not measured. megagrok's saves contain two digests of every byte; the others have none.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_page import write_page
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megagrok.bench.machine import describe_machine
from megagrok.checkpoint import AsyncSaver, Fragment, find_checkpoint, save_checkpoint
from megagrok.errors import MegagrokError
from megagrok.parallel.launch import run_ranks
from megagrok.parallel.ranks import JSON, ProcessGroupRanks

# More than there are rounds: old checkpoints are removed off the clock, whoever wrote them.
KEEP = 1_000_000
FACTS: dict[str, JSON] = {"run_id": "benchmark"}
OURS, OURS_SYNC = "megagrok, in the background", "megagrok, waited for"
DCP, DCP_KEPT, DCP_SYNC = "DCP async_save", "DCP async_save, kept stager", "DCP save"
NAMES = (OURS, OURS_SYNC, DCP, DCP_KEPT, DCP_SYNC)
# Hidden size, width of an expert and experts of a layer whose parts one rank holds.
_HIDDEN, _WIDTH, _EXPERTS = 1024, 512, 8


@dataclass(frozen=True, slots=True)
class Save:
    """One save, the slowest rank's clocks."""

    stall_seconds: float
    """Until the caller may change its tensors."""
    total_seconds: float
    """Until all of it is on the disk."""
    cpu_seconds: float
    """Of all ranks together."""


Contender = Callable[[int], Callable[[], object]]
"""Starts to save a step and returns, when tensors may change, what waits for the end."""


def make_state(rank: int, num_bytes: int) -> dict[str, torch.Tensor]:
    """About `num_bytes` of fp32 weights and moments as one rank of an expert-parallel run holds them."""
    random = torch.Generator().manual_seed(rank)
    state: dict[str, torch.Tensor] = {}
    layer, held = 0, 0
    while held < num_bytes:
        place = f"model.layers.{layer}"
        shapes = {f"{place}.self_attn.{name}_proj.weight": (_HIDDEN // 2, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{place}.{name}.weight": (_HIDDEN,) for name in ("pre_attn_norm", "pre_moe_norm")}
        for expert in range(_EXPERTS):
            name = f"{place}.block_sparse_moe.experts.{rank * _EXPERTS + expert}"
            shapes |= {f"{name}.{part}.weight": (_WIDTH, _HIDDEN) for part in ("w1", "w2", "w3")}
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for name, shape in shapes.items():
                tensor = torch.randn(shape, generator=random)
                state[f"{kind}/rank{rank}/{name}"] = tensor
                held += tensor.nbytes
        layer += 1
    return state


def fragments_of(state: dict[str, torch.Tensor]) -> list[Fragment]:
    """Each tensor whole, as its owner's fragment."""
    return [
        Fragment(name, tuple(x.shape), (0,) * x.dim(), tuple(x.shape), 0, x.numel(), x.view(-1))
        for name, x in state.items()
    ]


def make_contenders(state: dict[str, torch.Tensor], root: Path, ranks: ProcessGroupRanks) -> dict[str, Contender]:
    """Name to contender; each has a folder, and a process group for its background, of its own."""
    saver = AsyncSaver(root / OURS, ranks=ProcessGroupRanks(dist.new_group(backend="gloo")), keep=KEEP)
    group, kept_group = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    # async_save's own default, kept from save to save with its buffers instead of made anew.
    stager = DefaultStager(StagingOptions(False, False, False, False))

    def ours(step: int) -> Callable[[], object]:
        saver.save(step, fragments_of(state), FACTS)

        def finish() -> None:
            outcome = saver.finish()
            if outcome is None or outcome.error is not None:
                raise SystemExit(f"the save failed: {outcome and outcome.error}")

        return finish

    def ours_waited_for(step: int) -> Callable[[], object]:
        save_checkpoint(root / OURS_SYNC, step, fragments_of(state), FACTS, ranks=ranks, keep=KEEP)
        return lambda: None

    def dcp_async(step: int) -> Callable[[], object]:
        future = dcp.async_save(state, checkpoint_id=root / DCP / str(step), process_group=group)
        assert not isinstance(future, dcp.state_dict_saver.AsyncSaveResponse)
        return future.result

    def dcp_kept(step: int) -> Callable[[], object]:
        folder = root / DCP_KEPT / str(step)
        future = dcp.async_save(state, checkpoint_id=folder, async_stager=stager, process_group=kept_group)
        assert not isinstance(future, dcp.state_dict_saver.AsyncSaveResponse)
        return future.result

    def dcp_sync(step: int) -> Callable[[], object]:
        dcp.save(state, checkpoint_id=root / DCP_SYNC / str(step))
        return lambda: None

    return {OURS: ours, OURS_SYNC: ours_waited_for, DCP: dcp_async, DCP_KEPT: dcp_kept, DCP_SYNC: dcp_sync}


def time_one(contender: Contender, step: int, ranks: ProcessGroupRanks) -> Save:
    """One save of all ranks; collective."""
    ranks.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    finish = contender(step)
    stall = time.perf_counter() - started
    finish()
    total = time.perf_counter() - started
    clocks = ranks.gather([stall, total, time.process_time() - cpu])
    stalls, totals, cpus = ([float(clock[column]) for clock in clocks] for column in range(3))  # type: ignore[index, arg-type, call-overload]
    return Save(max(stalls), max(totals), sum(cpus))


def race(ranks: ProcessGroupRanks, root: Path, num_bytes: int, rounds: int) -> dict[str, list[Save]]:
    """All contenders, one save each a round, after one round to warm up; every rank calls it."""
    warnings.filterwarnings("ignore")
    state = make_state(ranks.rank, num_bytes // ranks.world_size)
    contenders = make_contenders(state, root, ranks)
    saves: dict[str, list[Save]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for turn in range(len(NAMES)):
            name = NAMES[(number + turn) % len(NAMES)]
            for tensor in state.values():
                tensor.view(-1)[0] = number
            save = time_one(contenders[name], number + 1, ranks)
            saves[name] += [save] if number else []
            if ranks.rank == 0:
                for old in (str(number), f"step-{number:08d}"):
                    shutil.rmtree(root / name / old, ignore_errors=True)
            # What one contender left to be written is not to be waited for by the next.
            if ranks.rank == 0:
                os.sync()
            ranks.barrier()
    for name in (OURS, OURS_SYNC):
        checkpoint = find_checkpoint(root / name, ranks=ranks)
        assert checkpoint is not None and checkpoint.step == rounds + 1, f"{name} saved nothing that verifies"
    return saves


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(saves: dict[str, list[Save]], num_bytes: int) -> list[dict[str, object]]:
    """One entry a contender; ratios are of saves of the same round, and above 1 megagrok is better."""
    entries: list[dict[str, object]] = []
    for name, of_one in saves.items():
        reference = saves[OURS_SYNC if name == DCP_SYNC else OURS]
        pairs = list(zip(of_one, reference, strict=True))
        entries.append(
            {
                "name": name,
                "stall_seconds": spread([save.stall_seconds for save in of_one]),
                "total_seconds": spread([save.total_seconds for save in of_one]),
                "gigabytes_per_second": spread([num_bytes / 1e9 / save.total_seconds for save in of_one]),
                "cpu_seconds": spread([save.cpu_seconds for save in of_one]),
                "stall_ratio": spread([save.stall_seconds / ours.stall_seconds for save, ours in pairs]),
                "total_ratio": spread([save.total_seconds / ours.total_seconds for save, ours in pairs]),
                "rounds": [asdict(save) for save in of_one],
            }
        )
    return entries


def main() -> int:
    """Race, print the table, write the results."""
    options = _parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    num_bytes = options.megabytes * 1_000_000
    root = Path(tempfile.mkdtemp(prefix="megagrok-benchmark-", dir=options.folder))
    try:
        saves = run_ranks(race, 2, root, num_bytes, options.rounds, timeout_seconds=300.0)[0]
        held = sum(x.nbytes for rank in range(2) for x in make_state(rank, num_bytes // 2).values())
    except MegagrokError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(root, ignore_errors=True)
    contenders = summarize(saves, held)
    record = {
        "rounds": options.rounds,
        "bytes": held,
        "tensors": sum(len(make_state(rank, num_bytes // 2)) for rank in range(2)),
        "ranks": 2,
        **describe_machine(load_before),
        "contenders": contenders,
    }
    for line in _lines(contenders):
        print(line)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_page(record, options.json.with_suffix(".md"))
    return 0


def _lines(contenders: list[dict[str, object]]) -> list[str]:
    lines = []
    for entry in contenders:
        medians = {key: value["median"] for key, value in entry.items() if isinstance(value, dict)}
        lines.append(
            f"{entry['name']:32} stall {medians['stall_seconds']:.3f} s ({medians['stall_ratio']:.1f} of megagrok's), "
            f"total {medians['total_seconds']:.2f} s ({medians['total_ratio']:.2f}), "
            f"{medians['gigabytes_per_second']:.2f} GB/s, CPU {medians['cpu_seconds']:.2f} s"
        )
    return lines


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800, metavar="N", help="tensors of both ranks together")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="timed rounds, after one to warm up")
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="where the checkpoints go, for a while"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here, and a page beside it (.md)")
    options = parser.parse_args()
    if options.rounds < 1 or options.megabytes < 1:
        parser.error("--rounds and --megabytes need at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
