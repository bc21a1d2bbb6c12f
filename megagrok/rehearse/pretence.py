"""A job of any size that one process pretends to be a rank of: fake peers, fake tensors. No data, so nothing to learn.

The only file that imports torch's private fakes. A fake process group answers every collective at once and sends
nothing; a fake tensor knows its shape, dtype, device and storage, and holds no numbers. Torch uses both to test itself
and to trace programs. Verified against torch 2.13.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagrok.platform import Platform

FAKE = Platform(torch.device("cpu"), "fake")
"""Where a rehearsal computes: the code takes its way for the CPU (parallel/cpu_seam.py), and nothing is computed."""


@contextmanager
def pretended_peers(rank: int, world_size: int) -> Iterator[None]:
    """The default process group, as rank `rank` of `world_size`; one that exists goes first."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(FAKE.backend, rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def pretended_tensors() -> Iterator[None]:
    """Every tensor that is made inside is fake."""
    before = torch.utils.swap_tensors
    vars(torch.utils)["swap_tensors"] = _keep
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        vars(torch.utils)["swap_tensors"] = before


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside `pretended_tensors`, tensors that hold numbers again."""
    with unset_fake_temporarily():
        yield


def constant_of(tensor: Tensor) -> Tensor | None:
    """What a fake tensor holds if it was written out in the code, such as torch.tensor(3); else None."""
    return tensor.constant if isinstance(tensor, FakeTensor) else None


def _keep(parameter: nn.Parameter, converted: nn.Parameter) -> None:
    """In the place of torch.utils.swap_tensors, by which Module.to puts a converted fake parameter where the old one
    was (torch 2.13 nn/modules/module.py:986), also if nothing was to convert; it refuses parameters that others refer
    to, as the fakes' own memo does. Nothing is ever converted here: parameters are made in the dtype they keep."""
    assert (parameter.dtype, parameter.device, parameter.shape) == (converted.dtype, converted.device, converted.shape)
