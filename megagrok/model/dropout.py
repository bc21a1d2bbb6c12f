"""Dropout without random state: whether a value is dropped is arithmetic, so every layout drops the same ones.

Not torch's dropout, whose generator would have to be split over ranks, saved, restored and rewound for recomputation.
The one idea: each token of a run has a number of its own, and (seed, layer, branch, number, feature) is hashed. Stages,
tensor and context ranks, any number of micro-batches, recomputation and a resumed run ask the same question and get
the same answer, on a CPU and on a GPU.

The hash is SplitMix64 (Steele, Lea, Flood 2014): each token starts a stream at a mixed 64-bit number, and each 64-bit
output decides about four features.
"""

# D features of a token; X any dimensions before them

import hashlib
from typing import Any

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_FEATURES = 4
"""Features that share a hash, 16 bits each."""
_CHANCES = 2**16


def token_numbers(sample_ids: Tensor, positions: Tensor, max_positions: int) -> Tensor:
    """A number for each token that no other token of the run has: int64, [samples, positions]."""
    return sample_ids[:, None] * max_positions + positions


def stream_of(seed: int, layer: int, branch: int) -> int:
    """The key of what one branch of one layer drops; layers from 0, branch 0 is attention and 1 the experts."""
    digest = hashlib.blake2b(f"{seed}/dropout/{layer}/{branch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def dropped(numbers_X: Tensor, stream: int, width: int, rate: float) -> Tensor:
    """Which of a token's `width` values are dropped, bool [X, D]; on the device of the numbers."""
    start_X = _mix(_mix(numbers_X * _signed(_STEP)) ^ _signed(stream))
    num_hashes = -(-width // _FEATURES)
    steps = torch.arange(1, num_hashes + 1, device=numbers_X.device) * _signed(_STEP)
    chances_XD = _mix(start_X[..., None] + steps).view(torch.int16)[..., :width]
    return chances_XD < _threshold(rate) - _CHANCES // 2


def scale_of(rate: float) -> float:
    """What kept values are multiplied by, so that their sum is expected to stay."""
    return _CHANCES / (_CHANCES - _threshold(rate))


def dropout(x_XD: Tensor, numbers_X: Tensor, stream: int, rate: float) -> Tensor:
    """x with its dropped values 0 and the others scaled. Keeps no mask for the backward pass, which asks again."""
    kept: Tensor = _Dropout.apply(x_XD, numbers_X, stream, rate)
    return kept


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, stream: int, rate: float) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.stream, ctx.rate = stream, rate
        return (x * scale_of(rate)).masked_fill_(dropped(numbers, stream, x.shape[-1], rate), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (numbers,) = grads, ctx.saved_tensors
        is_dropped = dropped(numbers, ctx.stream, grad.shape[-1], ctx.rate)
        return (grad * scale_of(ctx.rate)).masked_fill_(is_dropped, 0), None, None, None


def _threshold(rate: float) -> int:
    """Of 65536 equal chances, those that drop; never all, so that something is left to scale."""
    return min(round(rate * _CHANCES), _CHANCES - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place on int64. Products wrap; a shift of int64 copies the sign, so it is masked."""
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= _signed(0x94D049BB133111EB)
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z


def _signed(bits: int) -> int:
    """64 bits as the int64 that they spell."""
    return bits - 2**64 if bits >= 2**63 else bits
