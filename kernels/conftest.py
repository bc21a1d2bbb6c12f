"""Where the laws of the kernels run: on the CPU, Triton by its interpreter; and on a GPU, by marker."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any kernel.py is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and one GPU in the tier of that name."""
    return torch.device(request.param)
