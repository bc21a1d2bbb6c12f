"""Any layout reads any other, bit for bit, and the files are ordinary safetensors files."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megagrok.checkpoint import Fragment
from megagrok.checkpoint import load as loading
from megagrok.errors import CheckpointError, ShapeError
from megagrok.parallel.ranks import JSON
from tests.checkpoint.worlds import (
    DTYPES,
    all_ranks,
    cut,
    find,
    make_layout,
    make_tensor,
    make_tensors,
    read_all,
    same_bits,
    same_tensors,
    save_world,
)


@given(
    seed=st.integers(0, 2**32), world_size=st.integers(1, 4), shape=st.lists(st.integers(0, 7), max_size=3).map(tuple)
)
@settings(max_examples=100, deadline=None)
def test_any_block_can_be_read_from_any_layout(seed: int, world_size: int, shape: tuple[int, ...]) -> None:
    rng = random.Random(seed)
    tensors = {f"t{i}": make_tensor(rng, shape if i == 0 else (5, 4), rng.choice(DTYPES)) for i in range(2)}
    with tempfile.TemporaryDirectory() as folder:
        all_ranks(save_world(Path(folder), 7, make_layout(tensors, world_size, seed)))
        checkpoint = find(Path(folder))
        assert same_tensors(read_all(checkpoint), tensors)
        for name, tensor in tensors.items():
            start = tuple(rng.randint(0, n) for n in tensor.shape)
            block = tuple(rng.randint(0, n - s) for s, n in zip(start, tensor.shape, strict=True))
            expected = tensor[tuple(slice(s, s + n) for s, n in zip(start, block, strict=True))]
            assert same_bits(checkpoint.read(name, start, block), expected)


def test_saving_what_was_read_through_another_layout_keeps_every_bit(tmp_path: Path) -> None:
    tensors = make_tensors(5)
    for step, world_size in enumerate((1, 4, 2, 3), start=1):
        all_ranks(save_world(tmp_path, step, make_layout(tensors, world_size, seed=step)))
        tensors = read_all(find(tmp_path, step=step))
    assert same_tensors(tensors, make_tensors(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"x": make_tensor(random.Random(1), (9, 7), dtype), "scalar": make_tensor(random.Random(2), (), dtype)}
    all_ranks(save_world(tmp_path, 1, make_layout(tensors, 2, 3)))
    checkpoint = find(tmp_path)
    assert same_tensors(read_all(checkpoint), tensors)
    assert checkpoint.dtype_of("x") == dtype and checkpoint.shape_of("x") == (9, 7)


def test_the_public_safetensors_library_reads_every_shard(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    layout = make_layout(tensors, 3, 1)
    [folder, *_] = all_ranks(save_world(tmp_path, 12, layout))
    for rank, fragments in enumerate(layout):
        with safe_open(folder / f"rank-{rank:05d}.safetensors", framework="pt") as shard:
            marks = {
                "format": "pt",
                "run_id": "law",
                "step": "12",
                "rank": str(rank),
                "world_size": "3",
                "generation": "0",
            }
            assert shard.metadata() == marks
            assert sorted(shard.keys()) == sorted(fragment.key for fragment in fragments)
            for fragment in fragments:
                assert same_bits(shard.get_tensor(fragment.key).reshape(-1), fragment.data)


def test_a_whole_tensor_goes_by_its_own_name_and_shape_in_the_file(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    [folder] = all_ranks(save_world(tmp_path, 1, [[Fragment("w", (4, 3), (0, 0), (4, 3), 0, 12, weight.view(-1))]]))
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as shard:
        assert torch.equal(shard.get_tensor("w"), weight)


def test_reads_do_not_depend_on_how_much_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(3)
    all_ranks(save_world(tmp_path, 1, make_layout(tensors, 2, 3)))
    monkeypatch.setattr(loading, "CACHE_BYTES", 300)
    checkpoint = find(tmp_path)
    for _ in range(3):
        assert same_tensors(read_all(checkpoint), tensors)


def test_what_is_read_is_the_callers_to_change(tmp_path: Path) -> None:
    tensors = make_tensors(3)
    all_ranks(save_world(tmp_path, 1, make_layout(tensors, 2, 3)))
    checkpoint = find(tmp_path)
    for tensor in read_all(checkpoint).values():
        tensor.zero_()
    assert same_tensors(read_all(checkpoint), tensors)


def test_a_checkpoint_brings_back_its_facts_step_and_names(tmp_path: Path) -> None:
    facts: dict[str, JSON] = {
        "run_id": "a7",
        "config": {"lr": 1e-4, "steps": [1, None, True]},
        "consumed_samples": 1 << 50,
        "ß": "é",
    }
    tensors = make_tensors(1)
    all_ranks(save_world(tmp_path, 120, make_layout(tensors, 2, 1), facts=facts))
    checkpoint = find(tmp_path)
    assert checkpoint.facts == facts and checkpoint.step == 120 and checkpoint.path.name == "step-00000120"
    assert checkpoint.names() == tuple(sorted(tensors)) and checkpoint.skipped == ()
    assert (tmp_path / "latest").read_text() == "step-00000120\n"


def test_a_block_outside_the_tensor_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    all_ranks(save_world(tmp_path, 1, make_layout({"x": torch.zeros(4, 4)}, 1, 1)))
    checkpoint = find(tmp_path)
    for start, shape in [((0, 0), (5, 1)), ((-1, 0), (1, 1)), ((0,), (4,)), ((4, 0), (1, 1)), ((0, 0), (-1, 4))]:
        with pytest.raises(ShapeError, match="does not lie in"):
            checkpoint.read("x", start, shape)
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        checkpoint.read("y", (), ())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"begin": 3, "end": 2}, "do not lie"),
        ({"end": 99}, "do not lie"),
        ({"start": (3, 0)}, "does not lie"),
        ({"start": (0,)}, "dimensions"),
        ({"name": "../x"}, "names have"),
        ({"name": "a b"}, "names have"),
        ({"name": ""}, "names have"),
        ({"data": torch.zeros(2, 4)}, "one dimension"),
        ({"data": torch.zeros(7)}, "one dimension"),
        ({"data": torch.zeros(8, dtype=torch.complex64)}, "cannot be stored"),
        ({"global_shape": (2,) * 9, "start": (0,) * 9, "shape": (1,) * 9}, "at most 8"),
    ],
)
def test_a_fragment_whose_numbers_do_not_fit_is_refused(change: dict[str, object], text: str) -> None:
    sound = Fragment("x", (4, 4), (2, 0), (2, 4), 0, 8, torch.zeros(8))
    with pytest.raises(ShapeError, match=text):
        replace(sound, **change)  # type: ignore[arg-type]


def test_the_random_layouts_of_these_tests_do_cut_tensors() -> None:
    fragments = [cut(random.Random(seed), "x", torch.zeros(8, 8)) for seed in range(50)]
    assert max(map(len, fragments)) > 6
    assert any(f.shape != (8, 8) and f.end - f.begin < f.piece.box.size for group in fragments for f in group)
