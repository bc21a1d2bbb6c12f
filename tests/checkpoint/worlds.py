"""Small worlds for the checkpoint laws: ranks as threads, tensors from a seed, random layouts, and a disk that stops.

Threads, because a hundred worlds of processes take minutes; test_find.py repeats the central law over real processes.
"""

import errno
import json
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from megagrok.checkpoint import Checkpoint, Fence, Fragment, find_checkpoint
from megagrok.checkpoint.disk import Disk
from megagrok.checkpoint.fence import Unfenced
from megagrok.checkpoint.save import Save, save_through
from megagrok.parallel.ranks import JSON, Alone, Ranks

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Layout = list[list[Fragment]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.bool)


class Meeting:
    """Where threads meet: round after round of texts, and who has left for good."""

    def __init__(self, world_size: int) -> None:
        self.rounds: defaultdict[int, dict[int, str]] = defaultdict(dict)
        self.left: set[int] = set()
        self.world_size = world_size
        self.changed = threading.Condition()

    def exchange(self, round_number: int, rank: int, text: str) -> list[str]:
        """Everyone's text of this round; fails if somebody left before it, as collectives do when a process dies."""
        with self.changed:
            posted = self.rounds[round_number]
            posted[rank] = text
            self.changed.notify_all()
            full = self.changed.wait_for(
                lambda: len(posted) == self.world_size or self.left - posted.keys(), timeout=30
            )
            if not full or len(posted) < self.world_size:
                raise ConnectionError(f"ranks {sorted(self.left - posted.keys())} are gone")
            return [posted[other] for other in range(self.world_size)]

    def leave(self, rank: int) -> None:
        """This rank comes to no further round."""
        with self.changed:
            self.left.add(rank)
            self.changed.notify_all()


class ThreadRanks:
    """One thread's view of its peers."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world_size = rank, meeting.world_size
        self._meeting, self._round = meeting, 0

    def gather(self, value: JSON) -> list[JSON]:
        self._round += 1
        return [json.loads(text) for text in self._meeting.exchange(self._round, self.rank, json.dumps(value))]

    def barrier(self) -> None:
        self.gather(None)

    def any(self, flag: bool) -> bool:
        return True in self.gather(flag)


def run_world(world_size: int, work: Callable[[Ranks], T]) -> list[T | BaseException]:
    """work(ranks) on every rank; what each returned or raised."""
    meeting = Meeting(world_size)
    outcomes: list[T | BaseException] = [AssertionError("did not run")] * world_size

    def body(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadRanks(rank, meeting) if world_size > 1 else Alone())
        except BaseException as error:
            outcomes[rank] = error
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def all_ranks(outcomes: list[T | BaseException]) -> list[T]:
    """The results, or the first failure."""
    results = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


class Stopped(BaseException):
    """The machine dies here: nothing catches it."""


class StoppingDisk(Disk):
    """Dies or fails at the `at`-th change to the file system; a write gets half through first, a removal one file.

    Bytes that were written and not synced are gone after a death: that is what losing power does.
    """

    def __init__(self, at: int | None, fails_with: int | None = None) -> None:
        self.at, self.fails_with, self.count = at, fails_with, 0
        self.log: list[tuple[str, str]] = []
        self._open: dict[int, Path] = {}

    def _point(self, verb: str, path: Path) -> bool:
        """Whether this is the point. The log is the order of what was done."""
        self.count += 1
        self.log.append((verb, path.name))
        return self.count == self.at

    def _stop(self, path: Path) -> None:
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with), str(path))
        for unsynced in self._open.values():
            if unsynced.exists():
                os.truncate(unsynced, 0)
        raise Stopped

    def make_directory(self, path: Path) -> None:
        if self._point("make_directory", path):
            self._stop(path)
        super().make_directory(path)

    def create(self, path: Path) -> int:
        if self._point("create", path):
            self._stop(path)
        descriptor = super().create(path)
        self._open[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        path = self._open[descriptor]
        if self._point("write", path):
            super().write(descriptor, memoryview(data)[: len(data) // 2])
            self._stop(path)
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        path = self._open[descriptor]
        if self._point("sync", path):
            self._stop(path)
        self._open.pop(descriptor)

    def sync_directory(self, path: Path) -> None:
        if self._point("sync_directory", path):
            self._stop(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._point("rename", target):
            self._stop(target)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self._point("remove", path):
            self._stop(path)
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        if self._point("remove_tree", path):
            next(iter(path.iterdir())).unlink()
            self._stop(path)
        super().remove_tree(path)


def make_tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits of a dtype; NaNs of every kind included, for a checkpoint carries bits."""
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        return torch.tensor([rng.random() < 0.5 for _ in range(count)], dtype=dtype).view(shape)
    raw = bytearray(rng.randbytes(count * dtype.itemsize))
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def make_tensors(seed: int) -> Tensors:
    """A few tensors of several dtypes and ranks, as one optimizer step might leave them."""
    rng = random.Random(seed)
    shapes = {
        "weight/model.layers.0.self_attn.q_proj.weight": ((40, 24), torch.bfloat16),
        "master/model.layers.0.self_attn.q_proj.weight": ((40, 24), torch.float32),
        "exp_avg/model.layers.0.block_sparse_moe.experts.3.w1.weight": ((6, 5, 17), torch.float32),
        "exp_avg_sq/model.norm.weight": ((33,), torch.float64),
        "step": ((), torch.int64),
    }
    return {name: make_tensor(rng, shape, dtype) for name, (shape, dtype) in shapes.items()}


def cut(rng: random.Random, name: str, tensor: torch.Tensor) -> list[Fragment]:
    """A random layout of one tensor: blocks by random splits along random dimensions, each cut at flat positions."""
    shape = tuple(tensor.shape)
    blocks = [((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, 5)):
        start, block = blocks.pop(rng.randrange(len(blocks)))
        dims = [dim for dim, size in enumerate(block) if size > 1]
        if not dims:
            blocks.append((start, block))
            continue
        dim = rng.choice(dims)
        at = rng.randint(1, block[dim] - 1)
        left, right = list(block), list(block)
        left[dim], right[dim] = at, block[dim] - at
        beyond = list(start)
        beyond[dim] += at
        blocks += [(start, tuple(left)), (tuple(beyond), tuple(right))]
    fragments = []
    for start, block in blocks:
        flat = tensor[tuple(slice(s, s + n) for s, n in zip(start, block, strict=True))].reshape(-1)
        cuts = sorted({0, flat.numel(), *(rng.randint(0, flat.numel()) for _ in range(rng.randint(0, 3)))})
        ranges = list(zip(cuts, cuts[1:], strict=False)) or [(0, 0)]
        fragments += [Fragment(name, shape, start, block, begin, end, flat[begin:end]) for begin, end in ranges]
    return fragments


def make_layout(tensors: Tensors, world_size: int, seed: int) -> Layout:
    """All tensors cut at random and dealt to ranks at random."""
    rng = random.Random(seed)
    layout: Layout = [[] for _ in range(world_size)]
    for name, tensor in tensors.items():
        for fragment in cut(rng, name, tensor):
            rng.choice(layout).append(fragment)
    return layout


def save_world(
    root: Path,
    step: int,
    layout: Layout,
    *,
    keep: int = 2,
    disks: list[Disk] | None = None,
    facts: dict[str, JSON] | None = None,
    fence: Fence | None = None,
) -> list[Path | BaseException]:
    """Save over as many ranks as the layout has. Without given disks nothing waits for the medium."""
    using = disks or [StoppingDisk(None) for _ in layout]
    page: dict[str, JSON] = {"run_id": "law", "step": step} if facts is None else facts

    def work(ranks: Ranks) -> Path:
        save = Save(using[ranks.rank], root, step, page, ranks, keep, fence or Unfenced())
        return save_through(save, layout[ranks.rank]).path

    return run_world(len(layout), work)


def save_steps(root: Path, steps: list[int], *, world_size: int = 2, keep: int = 99) -> dict[int, Tensors]:
    """Save tensors that differ from step to step; returns them."""
    saved = {step: make_tensors(step) for step in steps}
    for step, tensors in saved.items():
        all_ranks(save_world(root, step, make_layout(tensors, world_size, step), keep=keep))
    return saved


def find(root: Path, **choice: object) -> Checkpoint:
    """The checkpoint that one rank finds."""
    found = find_checkpoint(root, ranks=Alone(), **choice)  # type: ignore[arg-type]
    assert found is not None
    return found


def read_all(checkpoint: Checkpoint) -> Tensors:
    """Every tensor, whole."""
    names = checkpoint.names()
    return {
        name: checkpoint.read(name, (0,) * len(checkpoint.shape_of(name)), checkpoint.shape_of(name)) for name in names
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; equal NaNs too."""
    bits_a, bits_b = (torch.empty(t.shape, dtype=t.dtype).copy_(t).view(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits_a, bits_b)


def same_tensors(a: Tensors, b: Tensors) -> bool:
    """The same names with the same bits."""
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@contextmanager
def small_file_system(path: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `path`; yields False where the machine does not let us mount one."""
    path.mkdir()
    mounted = (
        os.geteuid() == 0
        and os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)) == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            os.spawnlp(os.P_WAIT, "umount", "umount", str(path))


NO_SPACE, IO_ERROR = errno.ENOSPC, errno.EIO
