"""A save in the background is the same save: of the step it was asked for, whole or not at all, never two at once."""

import errno
import os
import random
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrok.checkpoint import AsyncSaver, Fragment, Outcome, find_checkpoint, list_steps, verify_checkpoint
from megagrok.checkpoint.disk import Disk, Space
from megagrok.checkpoint.staging import StagingBuffer
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON, Alone, ProcessGroupRanks, Ranks
from tests.checkpoint.worlds import (
    Layout,
    Stopped,
    StoppingDisk,
    all_ranks,
    find,
    make_layout,
    make_tensors,
    read_all,
    run_world,
    same_tensors,
    save_steps,
    save_world,
    small_file_system,
)
from tests.ranks import run_ranks

FACTS: dict[str, JSON] = {"run_id": "law"}
MANY_POINTS = 400


def whole(name: str, tensor: torch.Tensor) -> Fragment:
    """A tensor in one fragment, whose memory is the tensor's."""
    shape = tuple(tensor.shape)
    return Fragment(name, shape, (0,) * len(shape), shape, 0, tensor.numel(), tensor.view(-1))


def save_and_wait(saver: AsyncSaver, step: int, fragments: list[Fragment]) -> Outcome:
    assert saver.save(step, fragments, FACTS) is None
    outcome = saver.finish()
    assert outcome is not None and not saver.is_writing
    return outcome


class Gate(Disk):
    """A disk whose first write waits until it is let through."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        self.reached.set()
        assert self.opened.wait(30)
        super().write(descriptor, data)


@pytest.mark.fault("F27")
def test_what_is_saved_is_the_state_at_the_call_whatever_happens_to_it_afterwards(tmp_path: Path) -> None:
    disk = Gate()
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=2, disk=disk)
    tensors, expected = make_tensors(1), make_tensors(1)
    fragments = [whole(name, tensor) for name, tensor in tensors.items()]
    facts: dict[str, JSON] = {"run_id": "law", "data": {"consumed": [1, 2, 3]}}
    saver.save(7, fragments, facts)
    assert disk.reached.wait(30) and saver.is_writing and not saver.has_outcome
    for tensor in tensors.values():
        tensor.zero_()
    fragments.clear()
    facts["data"]["consumed"].append(4)  # type: ignore[index, union-attr, call-overload]
    facts["step"] = 8
    disk.opened.set()
    outcome = saver.finish()
    assert outcome is not None and outcome.is_in_place and outcome.step == 7 and outcome.error is None
    found = find(tmp_path)
    assert found.step == 7 and found.facts == {"run_id": "law", "data": {"consumed": [1, 2, 3]}}
    assert same_tensors(read_all(found), expected) and verify_checkpoint(found.path) == []


def test_the_buffer_is_allocated_once_and_only_grows(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=2)
    places = set()
    for step in range(1, 5):
        tensors = make_tensors(step)
        outcome = save_and_wait(saver, step, [whole(name, tensor) for name, tensor in tensors.items()])
        assert outcome.is_in_place and same_tensors(read_all(find(tmp_path)), tensors)
        assert outcome.bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        places.add(saver._staging._bytes.data_ptr())
    assert len(places) == 1
    save_and_wait(saver, 5, [whole("x", torch.zeros(1))])
    assert saver._staging.num_bytes == outcome.bytes
    assert saver._staging._bytes.data_ptr() in places


@pytest.mark.parametrize("seed", range(5))
def test_staged_fragments_are_the_same_bits_in_other_memory(seed: int) -> None:
    buffer = StagingBuffer()
    for round_ in range(3):
        fragments = make_layout(make_tensors(seed + round_), 1, seed)[0]
        staged = {fragment.key: fragment for fragment in buffer.stage(fragments)}
        begin = buffer._bytes.data_ptr()
        for fragment in fragments:
            copy = staged[fragment.key]
            assert copy.piece == fragment.piece and copy.data.dtype == fragment.data.dtype
            assert torch.equal(copy.data.view(torch.uint8), fragment.data.clone().view(torch.uint8))
            if fragment.data.numel():
                assert begin <= copy.data.data_ptr() < begin + buffer.num_bytes
    assert buffer.num_bytes == sum(fragment.num_bytes for fragment in fragments)


class SlowDisk(StoppingDisk):
    """Ten times slower than the saves come; counts how many files are open for writing at once."""

    def __init__(self) -> None:
        super().__init__(None)
        self.most_open = 0

    def sync(self, descriptor: int) -> None:
        self.most_open = max(self.most_open, len(self._open))
        time.sleep(0.1)
        super().sync(descriptor)


def test_a_slow_writer_holds_the_next_save_and_nothing_piles_up(tmp_path: Path) -> None:
    disk = SlowDisk()
    saver = AsyncSaver(tmp_path, ranks=Alone(), keep=2, disk=disk)
    big = torch.zeros(1 << 22)  # 16 MiB
    save_and_wait(saver, 1, [whole("x", big)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = threading.active_count()
    for step in range(2, 6):
        big += 1
        outcome = saver.save(step, [whole("x", big)], FACTS)
        assert threading.active_count() <= threads + 1
        if step > 2:
            assert outcome is not None and outcome.is_in_place and outcome.step == step - 1
            assert outcome.waited_seconds > 0.1 > outcome.held_seconds
        time.sleep(0.01)
    last = saver.finish()
    assert last is not None and last.step == 5 and last.is_in_place and disk.most_open == 1
    # Kilobytes: less than a second copy of what is saved.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
    assert torch.equal(read_all(find(tmp_path))["x"], torch.full((1 << 22,), 4.0))


def save_world_async(root: Path, step: int, layout: Layout, disks: list[Disk]) -> list[Outcome | BaseException]:
    """As save_world, with the write of each rank in its background thread."""

    def work(ranks: Ranks) -> Outcome:
        saver = AsyncSaver(root, ranks=ranks, keep=2, disk=disks[ranks.rank])
        return save_and_wait(saver, step, layout[ranks.rank])

    return run_world(len(layout), work)


@pytest.mark.fault("F3")
def test_a_death_at_any_point_of_the_thread_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    new = make_tensors(100)
    layout = make_layout(new, 1, 4)
    old = save_steps(tmp_path / "before", [1, 2], world_size=1)
    for at in range(1, MANY_POINTS):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        [outcome] = save_world_async(root, 3, layout, [StoppingDisk(at)])
        found = find(root)
        assert found.step in (2, 3)
        assert same_tensors(read_all(found), new if found.step == 3 else old[2])
        if not isinstance(outcome, BaseException):
            assert outcome.is_in_place and found.step == 3
            break
        assert isinstance(outcome, Stopped)
        all_ranks(save_world(root, 3, layout))
        assert same_tensors(read_all(find(root)), new)
    assert 10 < at < MANY_POINTS - 1


@pytest.mark.parametrize(
    "fails_with", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE, errno.EROFS], ids=os.strerror
)
def test_a_failure_anywhere_is_the_same_answer_on_all_ranks_and_the_next_save_succeeds(
    tmp_path: Path, fails_with: int
) -> None:
    layout = make_layout(make_tensors(100), 2, 4)
    old = save_steps(tmp_path / "before", [1, 2])
    rng = random.Random(fails_with)
    for victim in (0, 1):
        for at in rng.sample(range(1, 20), 6):
            root = tmp_path / f"{victim}-{at}"
            shutil.copytree(tmp_path / "before", root)

            def work(ranks: Ranks, root: Path = root, victim: int = victim, at: int = at) -> tuple[Outcome, Outcome]:
                disk = StoppingDisk(at if ranks.rank == victim else None, fails_with)
                saver = AsyncSaver(root, ranks=ranks, keep=2, disk=disk)
                first = save_and_wait(saver, 3, layout[ranks.rank])
                if ranks.rank == 0 and not first.is_in_place:
                    assert find(root).step == 2 and same_tensors(read_all(find(root)), old[2])
                return first, save_and_wait(saver, 4, layout[ranks.rank])

            outcomes = all_ranks(run_world(2, work))
            assert len({(str(first.error), first.is_in_place) for first, _ in outcomes}) == 1
            assert os.strerror(fails_with) in str(outcomes[0][0].error)
            assert f"rank {victim}" in str(outcomes[0][0].error)
            assert all(second.is_in_place and second.error is None for _, second in outcomes)
            assert find(root).step == 4 and not list(root.glob("*.tmp"))


class FullDisk(Disk):
    """Has no room for what is asked."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def free_space(self, path: Path) -> Space:
        return self.space

    def create(self, path: Path) -> int:
        raise AssertionError("wrote to a disk that is full")


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (Space(3_000_000, -1), r"No space left on .*: needs 8\.4 MB, has 3\.0 MB"),
        (Space(1 << 40, 3), r"No space left on .*: needs 4 files \(inodes\), has 3"),
    ],
)
def test_a_disk_without_room_is_found_before_a_byte_is_written(tmp_path: Path, space: Space, text: str) -> None:
    layout = [[whole("x", torch.zeros(1 << 20))], [whole("y", torch.zeros(1 << 20))]]
    outcomes = all_ranks(save_world_async(tmp_path, 1, layout, [FullDisk(space), FullDisk(Space(0, 0))]))
    assert len({str(outcome.error) for outcome in outcomes}) == 1
    with pytest.raises(CheckpointError, match=text):
        assert outcomes[0].error is not None
        raise outcomes[0].error
    assert find_checkpoint(tmp_path, ranks=Alone()) is None and not list(tmp_path.iterdir())


class Greedy(Disk):
    """Somebody else fills the disk at a random offset of the save."""

    def __init__(self, at: int, filler: Path) -> None:
        self.at, self.filler = at, filler

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        self.at -= 1
        if self.at == 0:
            try:
                with self.filler.open("wb", buffering=0) as file:
                    while file.write(bytes(1 << 16)):
                        pass
            except OSError:
                pass
        super().write(descriptor, data)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.fault("F20")
def test_a_disk_that_fills_up_during_a_save_costs_that_save_only(tmp_path: Path, seed: int) -> None:
    with small_file_system(tmp_path / "small", "8m") as mounted:
        if not mounted:
            pytest.skip("needs root and mount(8) for a tmpfs of 8 MiB")
        root, filler = tmp_path / "small" / "run", tmp_path / "small" / "filler"
        rng = random.Random(seed)
        old = save_steps(root, [1, 2])
        fragments = [whole(f"x{number}", torch.full((1 << 16,), float(number))) for number in range(10)]  # 2.6 MB
        saver = AsyncSaver(root, ranks=Alone(), keep=2, disk=Greedy(rng.randint(1, 11), filler))
        failed = save_and_wait(saver, 3, fragments)
        assert not failed.is_in_place
        with pytest.raises(CheckpointError, match=r"No space left on device \(this file needs 2\.\d MB; .* are free"):
            assert failed.error is not None
            raise failed.error
        assert list_steps(root) == [2, 1] and not list(root.glob("*.tmp"))
        assert same_tensors(read_all(find(root)), old[2])
        again = save_and_wait(saver, 3, fragments)
        assert not again.is_in_place and "needs 2.6 MB, has" in str(again.error)
        filler.unlink()
        assert save_and_wait(saver, 4, fragments).is_in_place and list_steps(root) == [4, 2]


def test_a_failed_prune_is_said_and_is_no_failed_save(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", [1, 2], world_size=1)

    class Stuck(Disk):
        def remove_tree(self, path: Path) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    saver = AsyncSaver(tmp_path / "run", ranks=Alone(), keep=2, disk=Stuck())
    outcome = save_and_wait(saver, 3, [whole("x", torch.ones(3))])
    assert outcome.is_in_place and "is in place" in str(outcome.error) and find(tmp_path / "run").step == 3


def test_what_is_no_answer_of_a_save_is_raised_where_the_run_sees_it(tmp_path: Path) -> None:
    class Broken(Alone):
        def gather(self, value: JSON) -> list[JSON]:
            raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")

    saver = AsyncSaver(tmp_path, ranks=Broken(), keep=2)
    saver.save(1, [whole("x", torch.ones(3))], FACTS)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.finish()
    assert not saver.is_writing and saver.finish() is None


def save_beside_other_collectives(ranks: Ranks, root: Path) -> tuple[list[bool], bool]:
    """Background saves over a group of their own while the main thread keeps the default group busy."""
    group = dist.new_group(backend="gloo")
    saver = AsyncSaver(root, ranks=ProcessGroupRanks(group), keep=2)
    tensors = make_tensors(3)
    layout = make_layout(tensors, ranks.world_size, 3)
    in_place, sums_agree = [], True
    for step in range(1, 6):
        previous = saver.save(step, layout[ranks.rank], FACTS)
        in_place += [previous.is_in_place] if previous else []
        for number in range(200):
            total = torch.full((1000,), float(ranks.rank + number))
            dist.all_reduce(total)
            sums_agree &= bool((total == 2 * number + 1).all())
        if ranks.any(saver.has_outcome):
            finished = saver.finish()
            assert finished is not None
            in_place.append(finished.is_in_place)
    finished = saver.finish()
    return in_place + ([finished.is_in_place] if finished else []), sums_agree


def test_the_writer_and_the_run_do_not_disturb_each_other(tmp_path: Path) -> None:
    results = run_ranks(save_beside_other_collectives, 2, root=tmp_path)
    assert results == [([True] * 5, True)] * 2
    assert list_steps(tmp_path) == [5, 4] and same_tensors(read_all(find(tmp_path)), make_tensors(3))


def lose_a_peer(ranks: Ranks, root: Path) -> str:
    """Rank 1 dies while rank 0's writer waits for it; rank 0 says what it was told, and how soon."""
    saver = AsyncSaver(root, ranks=ProcessGroupRanks(dist.new_group(backend="gloo")), keep=2)
    if ranks.rank == 0:
        saver.save(1, [whole("x", torch.ones(3))], FACTS)
        started = time.monotonic()
        try:
            saver.finish()
        except RuntimeError as error:
            (root / "told").write_text(f"{time.monotonic() - started < 10} {error}")
    else:
        time.sleep(0.3)
        os._exit(9)
    return ""


def test_a_peer_that_dies_during_a_write_is_noticed_at_once(tmp_path: Path) -> None:
    from megagrok.errors import RankError

    with pytest.raises(RankError, match="rank 1"):
        run_ranks(lose_a_peer, 2, root=tmp_path)
    told = (tmp_path / "told").read_text()
    assert told.startswith("True") and "gloo" in told
    assert list_steps(tmp_path) == []
