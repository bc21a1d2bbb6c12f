"""Preparation: once, whole or not at all, and equal for everybody."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megagrok.config.schema import DataConfig, SourceConfig
from megagrok.data.prepare import PreparedData, prepare
from megagrok.data.tokenizer import Tokenizer
from megagrok.data.tokens import TokenFile, bin_path, idx_path
from megagrok.errors import DataError, MachineError

TEXTS = [f"Document {i} speaks of {i * i} things, and of {'sheep ' * (i % 7)}.\nThe end of {i}." for i in range(300)]
VOCAB = 280


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(
        cache=str(tmp_path / "cache"),
        sources=(SourceConfig(kind="jsonl", path=str(path)),),
        tokenizer_vocab_size=VOCAB,
        held_out_fraction=0.1,
    )


def texts_of(prepared: PreparedData, *, held_out: bool) -> list[str]:
    assert prepared.tokenizer_path is not None
    tokenizer = Tokenizer.load(prepared.tokenizer_path)
    side = prepared.held_out() if held_out else prepared.train()
    documents = [side.file.read(int(d)).tolist() for d in side.documents]
    assert all(document[-1] == tokenizer.eos_id and tokenizer.eos_id not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def refusal(config: DataConfig, model_vocab_size: int = VOCAB, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        prepare(config, model_vocab_size=model_vocab_size)
    return str(caught.value)


def test_every_document_is_on_one_side_and_comes_back_as_text(config):
    prepared = prepare(config, model_vocab_size=VOCAB)
    train, held_out = texts_of(prepared, held_out=False), texts_of(prepared, held_out=True)
    assert sorted(train + held_out) == sorted(TEXTS) and 10 < len(held_out) < 60
    assert (prepared.num_train_documents, prepared.num_held_out_documents) == (len(train), len(held_out))
    assert prepared.num_train_tokens == prepared.train().lengths.sum()
    assert prepared.num_held_out_tokens == prepared.held_out().lengths.sum()
    assert TokenFile(prepared.prefix).dtype == np.uint16


def test_exact_copies_never_straddle_the_split(config, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(path.read_text() * 3)
    prepared = prepare(config, model_vocab_size=VOCAB)
    assert prepared.num_held_out_documents % 3 == 0 and prepared.num_held_out_documents > 0
    assert not set(texts_of(prepared, held_out=False)) & set(texts_of(prepared, held_out=True))


def test_a_second_call_only_opens_the_cache(config):
    first = prepare(config, model_vocab_size=VOCAB)
    times = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*")}
    assert prepare(config, model_vocab_size=VOCAB) == first
    assert {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*")} == times


def test_another_share_held_out_does_not_tokenize_again_and_is_other_data(config):
    first = prepare(config, model_vocab_size=VOCAB)
    second = prepare(dataclasses.replace(config, held_out_fraction=0.3), model_vocab_size=VOCAB)
    assert second.prefix == first.prefix and second.fingerprint != first.fingerprint
    assert set(texts_of(first, held_out=True)) < set(texts_of(second, held_out=True))


def test_the_fingerprint_follows_content_and_not_place(config, tmp_path):
    first = prepare(config, model_vocab_size=VOCAB)
    moved = tmp_path / "elsewhere.jsonl"
    (tmp_path / "x.jsonl").rename(moved)
    source = SourceConfig(kind="jsonl", path=str(moved))
    elsewhere = dataclasses.replace(config, cache=str(tmp_path / "other"), sources=(source,))
    assert prepare(elsewhere, model_vocab_size=VOCAB).fingerprint == first.fingerprint
    moved.write_text(moved.read_text().replace("Document 5 ", "Document five "))
    assert prepare(elsewhere, model_vocab_size=VOCAB).fingerprint != first.fingerprint


def test_a_given_tokenizer_makes_the_same_tokens_as_the_trained_one(config, tmp_path):
    first = prepare(config, model_vocab_size=VOCAB)
    given = dataclasses.replace(config, tokenizer=str(first.tokenizer_path), tokenizer_vocab_size=None)
    second = prepare(given, model_vocab_size=VOCAB)
    assert second.prefix != first.prefix
    assert bin_path(second.prefix).read_bytes() == bin_path(first.prefix).read_bytes()
    assert second.fingerprint == first.fingerprint


def _prepare_in_child(config: DataConfig, results: "multiprocessing.Queue[PreparedData]") -> None:
    results.put(prepare(config, model_vocab_size=VOCAB))


def test_processes_that_race_agree_and_leave_nothing_else(config):
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[PreparedData] = context.Queue()
    children = [context.Process(target=_prepare_in_child, args=(config, results)) for _ in range(3)]
    for child in children:
        child.start()
    prepared = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert prepared[0] == prepared[1] == prepared[2]
    assert os.listdir(config.cache) == [prepared[0].prefix.parent.name]


def test_a_failed_preparation_leaves_nothing(config, tmp_path):
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("broken\n")
    assert "x.jsonl line 301: not JSON" in refusal(config)
    assert os.listdir(config.cache) == []


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "hashes.npy", "tokenizer.json"])
def test_a_damaged_entry_is_refused_with_the_folder_to_delete(config, name):
    folder = prepare(config, model_vocab_size=VOCAB).prefix.parent
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    message = refusal(config)
    assert f"{name} has {len(content) - 1:,} bytes, was written with {len(content):,}. Delete the folder" in message
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(config)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00"])
def test_a_damaged_marker_is_refused(config, content):
    folder = prepare(config, model_vocab_size=VOCAB).prefix.parent
    (folder / "prepared.json").write_text(content)
    assert "Delete the folder" in refusal(config)


def test_a_cache_that_cannot_be_written_is_the_machines_fault(config, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "data.cache = " in (message := refusal(config, kind=MachineError)) and "cannot be written" in message


def test_settings_that_name_no_or_two_bodies_of_data_are_refused(config):
    assert "both empty" in refusal(DataConfig())
    assert "both given" in refusal(dataclasses.replace(config, tokens="x"))
    assert "both null" in refusal(dataclasses.replace(config, tokenizer_vocab_size=None))


def test_a_tokenizer_larger_than_the_model_is_refused(config):
    assert "tokenizer_vocab_size = 280, needs <= model.vocab_size = 279" in refusal(config, 279)
    first = prepare(config, model_vocab_size=VOCAB)
    given = dataclasses.replace(config, tokenizer=str(first.tokenizer_path), tokenizer_vocab_size=None)
    assert "the tokenizer has 280 tokens, needs <= model.vocab_size = 279" in refusal(given, 279)


def test_a_vocabulary_that_megatron_reads_two_ways_is_refused_before_the_work(config):
    message = refusal(dataclasses.replace(config, tokenizer_vocab_size=65_500), 100_000)
    assert "between 65,500 and 65,536" in message


def test_ready_made_tokens_are_split_by_content(prepare_tokens, write_pair):
    documents = [[i % 50, i % 7, 0] for i in range(200)]
    prepared = prepare_tokens(documents, 0.2)
    assert prepared.prefix == write_pair(documents) and prepared.tokenizer_path is None
    train, held_out = prepared.train(), prepared.held_out()
    assert sorted([*train.documents, *held_out.documents]) == list(range(200))
    sides = [{tuple(side.file.read(int(d)).tolist()) for d in side.documents} for side in (train, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path, write_pair):
    prefix = write_pair([[1, 2], [3, 150, 4], [5]])
    config = DataConfig(cache=str(tmp_path / "cache"), tokens=str(prefix))
    message = "x.bin: token 150 at document 1, needs < model.vocab_size = 150"
    assert message in refusal(config, 150)
    assert message in refusal(config, 150), "found again in the cache"
    assert prepare(config, model_vocab_size=151).num_train_tokens > 0
    negative = write_pair([[1, 2], [3, -7, 4]], "n", "int32")
    assert "n.bin: token -7 at document 1, needs >= 0" in refusal(dataclasses.replace(config, tokens=str(negative)))


def test_changed_tokens_are_other_data(tmp_path, prepare_tokens, write_pair):
    first = prepare_tokens([[1, 2, 3], [4, 5]])
    assert prepare_tokens([[1, 2, 3], [4, 5]]).fingerprint == first.fingerprint
    assert prepare_tokens([[1, 2, 3], [4, 6]]).fingerprint != first.fingerprint


def test_tokens_of_another_tokenizer_are_refused(config, tmp_path):
    first = prepare(config, model_vocab_size=VOCAB)
    other = prepare(dataclasses.replace(config, tokenizer_vocab_size=270), model_vocab_size=VOCAB)
    tokens = DataConfig(cache=config.cache, tokens=str(first.prefix), tokenizer=str(other.tokenizer_path))
    message = refusal(tokens)
    assert "was made with tokenizer" in message and f"Use {first.tokenizer_path}." in message
    right = dataclasses.replace(tokens, tokenizer=str(first.tokenizer_path))
    assert prepare(right, model_vocab_size=VOCAB).num_train_documents > 0


def test_a_dtype_too_small_for_the_tokenizer_is_refused(config, tmp_path, write_pair):
    tokenizer = prepare(config, model_vocab_size=VOCAB).tokenizer_path
    tokens = DataConfig(cache=config.cache, tokens=str(write_pair([[1, 2]], dtype="uint8")), tokenizer=str(tokenizer))
    assert "x.bin: uint8 holds 256 ids, the tokenizer has 280" in refusal(tokens)


def test_a_damaged_pair_is_refused(tmp_path, write_pair):
    prefix = write_pair([[1, 2], [3]])
    idx_path(prefix).unlink()
    assert "x.bin has no x.idx beside it" in refusal(DataConfig(cache=str(tmp_path / "c"), tokens=str(prefix)))


def test_data_too_short_for_the_run_is_said_with_what_would_do(prepare_tokens):
    prepared = prepare_tokens([[1, 2, 3], [4, 5, 6]], 0.5)
    assert prepared.problems(seq_len=2, evaluate_samples=1) == []
    training, evaluation = prepared.problems(seq_len=3, evaluate_samples=2)
    assert "train.seq_len = 3: a sample takes 4 tokens, the training documents have 3." in training
    assert "train.seq_len <= 2" in training
    assert "train.evaluate_samples = 2: the 1 held-out documents make 0 samples of 3 tokens" in evaluation


def test_the_stdlib_is_prepared_without_any_file_of_ones_own(tmp_path):
    source = SourceConfig(kind="python_stdlib", max_bytes=300_000)
    config = DataConfig(cache=str(tmp_path), sources=(source,), tokenizer_vocab_size=512)
    prepared = prepare(config, model_vocab_size=512)
    assert prepared.num_train_tokens > 50_000 and prepared.num_held_out_documents > 0
    assert prepared.problems(seq_len=64, evaluate_samples=4) == []
