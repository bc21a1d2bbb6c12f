"""What Megatron-core assumes about CUDA, met on the CPU. Inert on a GPU.

Torch itself is never touched. Each Megatron module listed below gets its own view of the name `torch`, in which
"the current CUDA device" is the CPU; nothing outside that module sees it. Verified against megatron-core 0.16.1;
0.17 to 0.19 keep these module names. `tests/parallel/test_cpu_seam.py` fails when one entry is no longer needed.

| Megatron module                    | what it asks of CUDA                                                       |
|------------------------------------|----------------------------------------------------------------------------|
| tensor_parallel/mappings.py:91 ff. | buffers on torch.cuda.current_device()                                     |
| tensor_parallel/layers.py:552 ff.  | the same, in ColumnParallelLinear's backward and weight allocation         |
| utils.py:631                       | the same, for the shared gather buffer of sequence parallelism             |
| pipeline_parallel/p2p_comm.py:313  | the same, for receive buffers (:398 synchronize: config.batch_p2p_sync)    |
| pipeline_parallel/schedules.py:596 | a token counter made with the literal device="cuda" (also :983, :2138)     |
| tensor_parallel/random.py:41, :72  | the CUDA generator's state, saved and restored around recomputation        |
| tensor_parallel/random.py:162      | a tracker of named CUDA generators, forked around each block (:244)        |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from megatron.core import utils as megatron_utils
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random

from megagrok.platform import Platform

_MODULES_THAT_ASK_FOR_A_DEVICE = (mappings, layers, megatron_utils, p2p_communication, schedules)
_RNG_STREAM = "model-parallel-rng"


def install_cpu_seam(platform: Platform) -> None:
    """Give Megatron's modules a CPU to run on; on a GPU only seed its generators. Called by every rank, any number
    of times, before the first group is made."""
    if platform.is_cuda:
        megatron_random.initialize_rng_tracker()
        return
    for module in _MODULES_THAT_ASK_FOR_A_DEVICE:
        vars(module)["torch"] = _torch_on_cpu()
    vars(megatron_random)["_get_cuda_rng_state"] = _get_cpu_rng_state
    vars(megatron_random)["_set_cuda_rng_state"] = _set_cpu_rng_state
    vars(megatron_random)["_CUDA_RNG_STATE_TRACKER"] = CpuRngTracker()
    vars(megatron_random)["_CUDA_RNG_STATE_TRACKER_INITIALIZED"] = True


def _torch_on_cpu() -> ModuleType:
    """A namespace equal to torch but for three names that would reach for a GPU."""
    cuda = ModuleType("torch.cuda")
    vars(cuda).update(vars(torch.cuda))
    vars(cuda)["current_device"] = lambda: torch.device("cpu")
    vars(cuda)["synchronize"] = lambda: None
    view = ModuleType("torch")
    vars(view).update(vars(torch))
    vars(view)["cuda"] = cuda
    vars(view)["zeros"] = _zeros_on_cpu
    return view


def _zeros_on_cpu(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.zeros that reads the device "cuda" as the CPU (schedules.py:596)."""
    return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def _get_cpu_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random streams, holding CPU generator states."""

    def __init__(self) -> None:
        super().__init__()
        self.add(_RNG_STREAM, 0)

    def add(self, name: str, seed: int) -> None:
        """Register stream `name`, started from `seed`."""
        outside = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        self.seeds_.add(seed)
        torch.set_rng_state(outside)

    @contextmanager
    def fork(self, name: str = _RNG_STREAM) -> Iterator[None]:
        """Draw from stream `name` inside the block, and from the surrounding stream after it."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)
