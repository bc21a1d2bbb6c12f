"""Which documents are held out: those whose hash is small. Nothing else decides it, no order and no random state.

Not a sampler. The one idea: equal documents have equal hashes, so exact copies never stand on both sides, and a larger
share only ever adds documents to the held-out side.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def document_hash(content: bytes) -> int:
    """A 64-bit keyed hash of a document: of its UTF-8 text, or of its stored tokens where no text is known."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=b"megagrok held out").digest())


def held_out_mask(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """True for the documents that are never trained on; uint64 [documents] -> bool [documents].

    About `fraction` of the distinct documents. If fraction is above 0 and no hash is small enough, the document with
    the smallest hash (and its copies) is held out, unless it is the only one.
    """
    if fraction <= 0 or hashes.size == 0:
        return np.zeros(hashes.shape, dtype=np.bool_)
    limit = min(int(fraction * 2.0**64), 2**64 - 1)
    chosen: NDArray[np.bool_] = hashes < np.uint64(limit)
    if chosen.any():
        return chosen
    smallest: NDArray[np.bool_] = hashes == hashes.min()
    return smallest if not smallest.all() else np.zeros(hashes.shape, dtype=np.bool_)
