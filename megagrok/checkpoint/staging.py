"""Host memory that a save is copied to, allocated once and used again. Knows no files and no threads.

The one idea: what is written must be the state of one step, so the bytes are copied while the step is held, and into
memory that nothing else can reach. Fresh memory costs more than the copy itself (every page is cleared and mapped when
it is first touched), so the buffer of the first save serves all later ones: one extra copy of this rank's part, ever.
"""

from collections.abc import Iterable

import torch

from megagrok.checkpoint.fragment import Fragment
from megagrok.checkpoint.shard import file_order


class StagingBuffer:
    """One flat run of bytes. Its fragments are valid until `stage` is called again."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """What is allocated."""
        return self._bytes.numel()

    def stage(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments with their elements copied here, from any device; returns when the copy is done."""
        # Wide dtypes first, so that every element is aligned without gaps.
        ordered = file_order(fragments)
        needed = sum(fragment.num_bytes for fragment in ordered)
        if needed > self.num_bytes:
            # Let go of the old one first: two at a time may be more than the host has.
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._bytes = torch.empty(needed, dtype=torch.uint8)
        staged, begin = [], 0
        for fragment in ordered:
            end = begin + fragment.num_bytes
            place = self._bytes[begin:end].view(fragment.data.dtype)
            place.copy_(fragment.data.detach())
            staged.append(fragment.with_data(place))
            begin = end
        return staged
