"""The tokenizer: nothing is lost, nothing is injected, and a hash tells two of them apart."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.data.tokenizer import EOS, PAD, SEPARATOR, Tokenizer, sample_texts, train_tokenizer
from megagrok.errors import DataError

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # it's the number of sheep\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 280)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_stand_where_grok_has_them(tokenizer):
    vocab = tokenizer._backend.get_vocab(with_added_tokens=True)
    assert [vocab[PAD], vocab[SEPARATOR], vocab[EOS]] == [0, 1, 2]
    assert tokenizer.eos_id == 2


def test_a_document_ends_with_one_eos_and_cannot_spell_it(tokenizer):
    texts = ["plain", f"I write {EOS} and {PAD}{SEPARATOR} myself", EOS]
    for text, tokens in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert tokens[-1] == 2
        assert not {0, 1, 2}.intersection(tokens[:-1].tolist())
        assert tokens[:-1].tolist() == tokenizer.encode(text)
        assert tokenizer.decode(tokens[:-1].tolist()) == text


def test_each_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer.encode("2026")) == 4
    assert all(not (len(word) > 1 and any(c.isdigit() for c in word)) for word in tokenizer._backend.get_vocab())


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.content_hash() == tokenizer.content_hash()
    assert loaded.encode(TEXTS[7]) == tokenizer.encode(TEXTS[7])
    assert (loaded.vocab_size, loaded.eos_id) == (280, 2)


def test_the_hash_sees_merges_and_not_spacing(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).content_hash() == tokenizer.content_hash()
    del content["model"]["merges"][-1]
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).content_hash() != tokenizer.content_hash()


def test_training_does_not_depend_on_the_order_of_the_texts(tokenizer):
    assert train_tokenizer(reversed(TEXTS), 280).content_hash() == tokenizer.content_hash()


def test_padding_and_truncation_of_a_loaded_file_are_switched_off(tokenizer, tmp_path):
    backend = tokenizer._backend.from_str(tokenizer._backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_the_training_sample_is_bounded_and_does_not_depend_on_order():
    texts = [f"{i} " * 500 for i in range(300)]
    sample = sample_texts(texts, 20_000)
    size = sum(len(text.encode()) for text in sample)
    assert 20_000 <= size < 20_000 + max(map(len, texts))
    assert sample == sample_texts(reversed(texts), 20_000)
    assert set(sample) < set(texts)


def test_one_giant_text_does_not_crowd_out_the_others():
    sample = sample_texts(["x" * 10_000_000, "small"], 1_000_000)
    assert "small" in sample and sum(map(len, sample)) < 100_000


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match=r"tokenizer_vocab_size = 258, needs at least 259: 256 bytes and 3 special"):
        train_tokenizer(TEXTS, 258)


def test_a_bad_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer = .*gone\.json: no such file"):
        Tokenizer.load(tmp_path / "gone.json")
    for name, content in [
        ("text.json", b"hello"),
        ("list.json", b"[]"),
        ("bytes.json", b"\xff\xfe\x00"),
        ("e.json", b""),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: not a tokenizer\.json"):
            Tokenizer.load(tmp_path / name)


def test_a_tokenizer_that_ends_no_document_is_refused(tokenizer, tmp_path):
    content = json.loads(tokenizer._backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != EOS]
    del content["model"]["vocab"][EOS]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"t\.json: no token ends a document, needs one of <\|eos\|>, <\|endoftext\|>"):
        Tokenizer.load(tmp_path / "t.json")
