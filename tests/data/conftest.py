"""Token files and prepared data that the tests of this room share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megagrok.config.schema import DataConfig
from megagrok.data.prepare import PreparedData, prepare
from megagrok.data.tokens import TokenWriter

WritePair = Callable[..., Path]
PrepareTokens = Callable[..., PreparedData]


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """write_pair([[1, 2], [3]], "name", "uint16") -> prefix of a pair that our writer made."""

    def write(documents: Sequence[Sequence[int]], name: str = "x", dtype: str = "uint16") -> Path:
        prefix = tmp_path / name
        with TokenWriter(prefix, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add(list(document))
        return prefix

    return write


@pytest.fixture
def prepare_tokens(tmp_path: Path, write_pair: WritePair) -> PrepareTokens:
    """prepare_tokens(documents, held_out_fraction) -> PreparedData of a pair with those documents, 100 ids at most."""

    def make(documents: Sequence[Sequence[int]], held_out_fraction: float = 0.0) -> PreparedData:
        config = DataConfig(
            cache=str(tmp_path / "cache"), tokens=str(write_pair(documents)), held_out_fraction=held_out_fraction
        )
        return prepare(config, model_vocab_size=100)

    return make
