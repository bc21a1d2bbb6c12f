"""RMSNorm as Megatron's ModuleSpecs want it, and Grok's post-norm residual in the place of bias-dropout-add."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megagrok.model.dropout import dropout, stream_of
from megagrok.model.transformer_config import GrokTransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32, returned in x's dtype.

    Under sequence parallelism each tensor rank norms other positions, so the gain's gradient is a part of the whole;
    the tag `sequence_parallel` asks the engine to sum it.
    """

    def __init__(self, config: GrokTransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.kernel = config.kernels.norm
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_D: Tensor) -> Tensor:
        return self.kernel.rms_norm(x_D, self.weight, self.eps)

    def add_to(self, residual_D: Tensor, x_D: Tensor) -> Tensor:
        """residual + norm(x)."""
        return self.kernel.add_rms_norm(residual_D, x_D, self.weight, self.eps)


class PostNormResidual(nn.Module):
    """residual + dropout(RMSNorm(sub-block output)). Stands in TransformerLayer's bias-dropout-add slots, which call it
    twice: first with (training, fused), then the returned function with ((output, bias), residual, probability)."""

    def __init__(self, config: GrokTransformerConfig, branch: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.rate = config.grok.dropout
        self._seed, self._branch = config.dropout_seed, branch
        self._stream = 0
        self._numbers_sb: Tensor | None = None

    def settle(self, layer: int) -> None:
        """Say which layer this is, counted from 0 over the whole model: the slot is built without knowing."""
        self._stream = stream_of(self._seed, layer, self._branch)

    def expect(self, numbers_sb: Tensor | None) -> None:
        """Say which tokens the next call is about (`megagrok.model.dropout`); read only where dropout drops."""
        self._numbers_sb = numbers_sb

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
        return self._add_some if training and self.rate else self._add

    def _add(self, output: tuple[Tensor, None], residual: Tensor, _probability: float) -> Tensor:
        return self.norm.add_to(residual, output[0])

    def _add_some(self, output: tuple[Tensor, None], residual: Tensor, _probability: float) -> Tensor:
        assert self._numbers_sb is not None, "dropout needs to know its tokens"
        return residual + dropout(self.norm(output[0]), self._numbers_sb, self._stream, self.rate)
