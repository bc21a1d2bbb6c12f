"""Text to token ids and back: a byte-level BPE of Hugging Face `tokenizers`, trained here or loaded from a file.

Not a tokenizer of our own. The one idea: a tokenizer is known by the hash of what it does, so that data made with one
is never read with another. Trained ones have Grok's three first special tokens, and split text by Grok's pattern,
in which every digit stands alone.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megagrok.errors import DataError

PAD, SEPARATOR, EOS = "<|pad|>", "<|separator|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, SEPARATOR, EOS)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

# The pattern named V1 in xAI's tokenizer files.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names under which published tokenizers keep the token that ends a document, ours first.
_EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>")

TRAINING_BYTES = 3_000_000
"""Text that a BPE is trained on at most: enough for small vocabularies, and a matter of seconds."""
_TRAINING_BYTES_PER_DOCUMENT = 65_536


class Tokenizer:
    """A loaded tokenizer that adds nothing of its own: no padding, no truncation, no first token."""

    def __init__(self, backend: tokenizers.Tokenizer, place: str) -> None:
        """place: where it came from, for messages. Raises DataError if no token ends a document."""
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        # Text that spells "<|eos|>" is text: a document must not be able to end itself.
        self._backend.encode_special_tokens = True
        eos_ids = [number for name in _EOS_NAMES if (number := backend.token_to_id(name)) is not None]
        if not eos_ids:
            raise DataError(f"{place}: no token ends a document, needs one of {', '.join(_EOS_NAMES)}")
        self.eos_id: int = eos_ids[0]
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """Largest token id plus one."""

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises DataError if it is missing or not one."""
        if not path.is_file():
            raise DataError(f"data.tokenizer = {path}: no such file. Needs the path of a tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # The library raises bare Exception for everything that is wrong with a file.
        except Exception as error:
            raise DataError(f"data.tokenizer = {path}: not a tokenizer.json ({error})") from error
        return cls(backend, str(path))

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load`, transformers and vLLM read."""
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def content_hash(self) -> str:
        """16 hex digits that change when any id, merge or splitting rule does, and not with the file's spacing."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a token that ends it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text with the end-of-document id appended. Uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are written out. The inverse of `encode`."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE on a sample of the texts; the same texts in any order give the same tokenizer.

    The tokenizer may come out smaller than vocab_size if the texts have too few distinct words.
    Raises DataError if vocab_size does not hold the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"data.tokenizer_vocab_size = {vocab_size}, needs at least {SMALLEST_VOCAB}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample_texts(texts, TRAINING_BYTES), trainer)
    return Tokenizer(backend, "trained tokenizer")


def sample_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The beginnings of the texts with the smallest hashes, about max_bytes in all: a draw that needs no seed.

    One pass, and never more than about max_bytes in memory. Independent of the order of the texts.
    """
    kept: list[tuple[int, bytes]] = []
    total = 0
    for text in texts:
        piece = text[:_TRAINING_BYTES_PER_DOCUMENT].encode()
        rank = int.from_bytes(hashlib.blake2b(piece, digest_size=8, person=b"tokenizer").digest())
        heapq.heappush(kept, (-rank, piece))
        total += len(piece)
        while total - len(kept[0][1]) >= max_bytes:
            total -= len(heapq.heappop(kept)[1])
    return [piece.decode() for _, piece in sorted(kept, reverse=True)]
