"""From the settings of the data to token files on disk: once, in a cache that runs share.

Not for every rank: one process prepares (before it starts the others), the ranks only open what it returns. The one
idea: what decides the tokens is described as JSON, and the description's hash is the name under which they are kept.

    cache/text-<key>/     tokens.bin  tokens.idx  tokenizer.json  hashes.npy  prepared.json     from data.sources
    cache/tokens-<key>/   hashes.npy  prepared.json                                             from data.tokens

hashes.npy has one 64-bit hash per document, from which the held-out split follows (split.py).
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from megagrok.config.schema import DataConfig
from megagrok.data.cache import MARKER, cached_entry, read_marker
from megagrok.data.corpus import Source, find_sources, read_documents
from megagrok.data.readers import Document
from megagrok.data.split import document_hash, held_out_mask
from megagrok.data.tokenizer import Tokenizer, train_tokenizer
from megagrok.data.tokens import TokenFile, TokenWriter, bin_path, dtype_for_vocab, idx_path
from megagrok.errors import DataError

_FORMAT = 1
_CHUNK_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class DocumentSet:
    """Some documents of a token file, by their numbers in the file: one side of the held-out split."""

    file: TokenFile
    documents: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document of the set, int64 [documents]."""
        lengths: NDArray[np.int64] = self.file.lengths[self.documents]
        return lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Tokens on disk and the split; paths and numbers only, so it crosses a fork or a pickle unchanged."""

    prefix: Path
    """Token file pair that holds all documents, both sides of the split."""
    hashes_path: Path
    """One 64-bit hash per document (.npy)."""
    held_out_fraction: float
    tokenizer_path: Path | None
    """The tokenizer.json; None for ready-made tokens without one."""
    tokenizer_hash: str
    """Of its content; empty without one."""
    fingerprint: str
    """Changes when the documents, their tokens, their order or the split do; not with paths or times."""
    num_train_documents: int
    num_train_tokens: int
    num_held_out_documents: int
    num_held_out_tokens: int

    def train(self) -> DocumentSet:
        """The documents to train on. Any rank; opens the files."""
        return self._open(held_out=False)

    def held_out(self) -> DocumentSet:
        """The documents that are never trained on; may be empty. Any rank; opens the files."""
        return self._open(held_out=True)

    def problems(self, *, seq_len: int, evaluate_samples: int) -> list[str]:
        """Why samples of seq_len tokens cannot serve training and evaluation; empty if they can."""
        found = (self.training_problem(seq_len), self.evaluation_problem(seq_len, evaluate_samples))
        return [problem for problem in found if problem is not None]

    def training_problem(self, seq_len: int) -> str | None:
        """Why the training documents do not make up one sample; None if they do."""
        if self.num_train_tokens > seq_len:
            return None
        return (
            f"train.seq_len = {seq_len:,}: a sample takes {seq_len + 1:,} tokens, the training documents have "
            f"{self.num_train_tokens:,}. Use more data, or train.seq_len <= {max(self.num_train_tokens - 1, 1):,}."
        )

    def evaluation_problem(self, seq_len: int, evaluate_samples: int) -> str | None:
        """Why the held-out documents do not make up the samples of an evaluation; None if they do."""
        samples = max(self.num_held_out_tokens - 1, 0) // seq_len
        if samples >= evaluate_samples:
            return None
        return (
            f"train.evaluate_samples = {evaluate_samples:,}: the {self.num_held_out_documents:,} held-out documents "
            f"make {samples:,} samples of {seq_len:,} tokens. Raise data.held_out_fraction "
            f"({self.held_out_fraction}), add data, or use train.evaluate_samples <= {samples:,}."
        )

    def _open(self, *, held_out: bool) -> DocumentSet:
        file = TokenFile(self.prefix)
        mask = held_out_mask(_load_hashes(self.hashes_path, file), self.held_out_fraction)
        return DocumentSet(file, np.flatnonzero(mask == held_out).astype(np.int64))


def prepare(config: DataConfig, *, model_vocab_size: int) -> PreparedData:
    """Tokenize the sources into the cache, or look through ready-made tokens; a second call only opens the cache.

    Called by one process, before ranks exist; a race between two processes is harmless. model_vocab_size: rows of the
    embedding table. Raises DataError for whatever is wrong with the data, the tokenizer or the cache entry, and
    MachineError if the cache cannot be written.
    """
    if config.tokens is not None and config.sources:
        raise DataError("data.sources and data.tokens are both given. Keep one of them.")
    if config.tokens is not None:
        return _prepare_tokens(config, Path(config.tokens), model_vocab_size)
    if not config.sources:
        raise DataError("data.sources and data.tokens are both empty. Give one of them, e.g. kind: python_stdlib.")
    return _prepare_text(config, model_vocab_size)


def _prepare_text(config: DataConfig, model_vocab_size: int) -> PreparedData:
    sources = find_sources(config.sources)
    loaded = Tokenizer.load(Path(config.tokenizer)) if config.tokenizer is not None else None
    if loaded is not None:
        _check_vocab(loaded, model_vocab_size)
    elif config.tokenizer_vocab_size is None:
        raise DataError("data.tokenizer and data.tokenizer_vocab_size are both null. Give a file, or a size to train.")
    elif config.tokenizer_vocab_size > model_vocab_size:
        raise DataError(
            f"data.tokenizer_vocab_size = {config.tokenizer_vocab_size:,}, "
            f"needs <= model.vocab_size = {model_vocab_size:,}"
        )
    # Found out before the work, not after it.
    dtype_for_vocab(loaded.vocab_size if loaded else config.tokenizer_vocab_size or 0)
    description = {
        "format": _FORMAT,
        "tokenizers": tokenizers.__version__,
        "sources": [source.describe() for source in sources],
        "tokenizer": loaded.content_hash() if loaded else f"train {config.tokenizer_vocab_size}",
    }

    def build(folder: Path) -> dict[str, object]:
        return _tokenize(sources, loaded, config.tokenizer_vocab_size or 0, folder)

    folder = cached_entry(Path(config.cache), "text", description, build)
    tokenizer_path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(tokenizer_path)
    _check_vocab(tokenizer, model_vocab_size)
    prefix = folder / "tokens"
    return _prepared(prefix, folder, config.held_out_fraction, tokenizer_path, tokenizer.content_hash())


def _prepare_tokens(config: DataConfig, prefix: Path, model_vocab_size: int) -> PreparedData:
    file = TokenFile(prefix)
    tokenizer_path = Path(config.tokenizer) if config.tokenizer is not None else None
    tokenizer_hash = ""
    if tokenizer_path is not None:
        tokenizer = Tokenizer.load(tokenizer_path)
        _check_vocab(tokenizer, model_vocab_size)
        tokenizer_hash = tokenizer.content_hash()
        _check_same_tokenizer(prefix, tokenizer_hash)
        largest_id = np.iinfo(file.dtype).max
        if tokenizer.vocab_size - 1 > largest_id:
            raise DataError(
                f"{bin_path(prefix)}: {file.dtype.name} holds {largest_id + 1:,} ids, the tokenizer has "
                f"{tokenizer.vocab_size:,}. Made with another tokenizer?"
            )
    status = bin_path(prefix).stat()
    description = {
        "format": _FORMAT,
        "tokens": str(prefix.resolve()),
        "bin": [status.st_size, status.st_mtime_ns],
        "idx": hashlib.sha256(idx_path(prefix).read_bytes()).hexdigest(),
    }
    folder = cached_entry(Path(config.cache), "tokens", description, lambda folder: _look_through(file, folder))
    marker = read_marker(folder)
    largest, document = marker["largest_token"], marker["largest_token_document"]
    assert isinstance(largest, int) and isinstance(document, int)
    if largest >= model_vocab_size:
        raise DataError(
            f"{bin_path(prefix)}: token {largest:,} at document {document:,}, "
            f"needs < model.vocab_size = {model_vocab_size:,}"
        )
    return _prepared(prefix, folder, config.held_out_fraction, tokenizer_path, tokenizer_hash)


def _prepared(
    prefix: Path, folder: Path, fraction: float, tokenizer_path: Path | None, tokenizer_hash: str
) -> PreparedData:
    file = TokenFile(prefix)
    hashes = _load_hashes(folder / "hashes.npy", file)
    mask = held_out_mask(hashes, fraction)
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer_hash} {fraction!r}".encode())
    digest.update(hashes.astype("<u8").tobytes())
    digest.update(file.lengths.astype("<i8").tobytes())
    held_out_tokens = int(file.lengths[mask].sum())
    return PreparedData(
        prefix=prefix,
        hashes_path=folder / "hashes.npy",
        held_out_fraction=fraction,
        tokenizer_path=tokenizer_path,
        tokenizer_hash=tokenizer_hash,
        fingerprint=digest.hexdigest()[:32],
        num_train_documents=int((~mask).sum()),
        num_train_tokens=file.num_tokens - held_out_tokens,
        num_held_out_documents=int(mask.sum()),
        num_held_out_tokens=held_out_tokens,
    )


def _tokenize(
    sources: tuple[Source, ...], loaded: Tokenizer | None, vocab_size: int, folder: Path
) -> dict[str, object]:
    """Write tokens, tokenizer and document hashes of all sources, in their order, into the folder."""
    tokenizer = loaded or train_tokenizer((document.text for document in _read_all(sources)), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    hashes: list[int] = []
    with TokenWriter(folder / "tokens", dtype_for_vocab(tokenizer.vocab_size)) as writer:
        for texts in _chunks(document.text for document in _read_all(sources)):
            for tokens in tokenizer.encode_documents(texts):
                writer.add(tokens)
            hashes.extend(document_hash(text.encode()) for text in texts)
    _save_hashes(folder / "hashes.npy", hashes)
    return {"tokenizer_hash": tokenizer.content_hash(), "vocab_size": tokenizer.vocab_size}


def _look_through(file: TokenFile, folder: Path) -> dict[str, object]:
    """Hash every document of ready-made tokens, and find the largest token. Raises DataError at a negative one."""
    hashes: list[int] = []
    largest, largest_document = -1, -1
    for document in range(file.num_documents):
        tokens = file.read(document)
        hashes.append(document_hash(tokens.tobytes()))
        if tokens.size == 0:
            continue
        if int(tokens.min()) < 0:
            raise DataError(
                f"{bin_path(file.prefix)}: token {int(tokens.min()):,} at document {document:,}, needs >= 0"
            )
        if int(tokens.max()) > largest:
            largest, largest_document = int(tokens.max()), document
    _save_hashes(folder / "hashes.npy", hashes)
    return {"largest_token": largest, "largest_token_document": largest_document}


def _read_all(sources: Iterable[Source]) -> Iterator[Document]:
    return itertools.chain.from_iterable(read_documents(source) for source in sources)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about _CHUNK_CHARACTERS, large enough to keep all cores of the tokenizer busy."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, needs <= model.vocab_size = {model_vocab_size:,}"
        )


def _check_same_tokenizer(prefix: Path, tokenizer_hash: str) -> None:
    """Tokens out of our own cache know their tokenizer; foreign ones say nothing and are taken at their word."""
    marker_path = prefix.parent / MARKER
    if not marker_path.is_file():
        return
    made_with = read_marker(prefix.parent).get("tokenizer_hash")
    if made_with is not None and made_with != tokenizer_hash:
        raise DataError(
            f"{bin_path(prefix)} was made with tokenizer {made_with}, data.tokenizer is {tokenizer_hash}. "
            f"Use {prefix.parent / 'tokenizer.json'}."
        )


def _save_hashes(path: Path, hashes: list[int]) -> None:
    with path.open("wb") as file:
        np.save(file, np.array(hashes, dtype="<u8"), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _load_hashes(path: Path, file: TokenFile) -> NDArray[np.uint64]:
    try:
        hashes = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}). Delete the folder {path.parent} to build it again.") from error
    if hashes.shape != (file.num_documents,) or hashes.dtype != np.uint64:
        raise DataError(
            f"{path}: {hashes.dtype} {hashes.shape}, needs one uint64 for each of the {file.num_documents:,} "
            f"documents of {file.prefix}. Delete the folder {path.parent} to build it again."
        )
    return np.asarray(hashes, dtype=np.uint64)
