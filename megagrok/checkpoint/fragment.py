"""The unit of a checkpoint: a named, placed run of elements. No files, and no idea which rank or layout it came from.

Tensor parallelism cuts a tensor into blocks, ZeRO cuts a block at any flat position; a fragment says both, so whoever
reads it back needs neither layout.
"""

import re
from dataclasses import dataclass, replace
from math import prod

import torch

from megagrok.checkpoint.geometry import Box, Index, Piece
from megagrok.errors import ShapeError

# Names of the safetensors format. A dtype outside this table cannot be stored and cannot be asked for by a file.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,511}")
MAX_DIMS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """Elements begin..end of one rectangular block of a global tensor.

    Replicas are the caller's to leave out: over all ranks, the fragments of a name cover its tensor exactly once.
    Raises ShapeError if the numbers do not fit together, or for a name or dtype that the format cannot hold.
    """

    name: str
    """Global name, e.g. "exp_avg/model.layers.0.self_attn.q_proj.weight"; letters, digits and . _ / - only."""
    global_shape: Index
    """Shape of the whole tensor; () for a scalar."""
    start: Index
    """Where the block begins in the whole tensor."""
    shape: Index
    """Shape of the block."""
    begin: int
    """First element that this fragment holds, counted in C order inside the block."""
    end: int
    """One past the last element."""
    data: torch.Tensor
    """The end - begin elements, one-dimensional, on any device. Read during the save, never kept."""

    def __post_init__(self) -> None:
        problem = fragment_problem(self.name, self.global_shape, self.piece)
        if problem is None and tuple(self.data.shape) != (self.end - self.begin,):
            problem = f"data has shape {tuple(self.data.shape)}, elements {self.begin}..{self.end} need one dimension"
        if problem is None and self.data.dtype not in DTYPE_NAMES:
            problem = f"dtype {self.data.dtype} cannot be stored; choose one of {', '.join(map(str, DTYPE_NAMES))}"
        if problem is not None:
            raise ShapeError(f"fragment {self.name!r}: {problem}")

    @property
    def piece(self) -> Piece:
        """Where the elements stand, without the elements."""
        return Piece(Box(self.start, self.shape), self.begin, self.end)

    def with_data(self, data: torch.Tensor) -> "Fragment":
        """The same place with other elements."""
        return replace(self, data=data)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.data.numel() * self.data.dtype.itemsize

    @property
    def key(self) -> str:
        """Name inside the file: the tensor's own name if the fragment is all of it, else with its place."""
        if self.shape == self.global_shape and (self.begin, self.end) == (0, prod(self.shape)):
            return self.name
        place = ",".join(map(str, self.start)) + "+" + ",".join(map(str, self.shape))
        return f"{self.name}@{place}[{self.begin}:{self.end}]"


def fragment_problem(name: str, global_shape: Index, piece: Piece) -> str | None:
    """Why a piece cannot belong to a tensor of this name and shape, or None. Shared by writer and reader."""
    box = piece.box
    if not NAME_PATTERN.fullmatch(name):
        return "names have 1 to 512 letters, digits, and . _ / -"
    if len(global_shape) > MAX_DIMS:
        return f"{len(global_shape)} dimensions, at most {MAX_DIMS}"
    if not len(box.start) == len(box.shape) == len(global_shape):
        return f"start {box.start}, shape {box.shape} and global shape {global_shape} differ in dimensions"
    if any(s < 0 or n < 0 or s + n > g for s, n, g in zip(box.start, box.shape, global_shape, strict=True)):
        return f"block at {box.start} of shape {box.shape} does not lie in {global_shape}"
    if not 0 <= piece.begin <= piece.end <= box.size:
        return f"elements {piece.begin}..{piece.end} do not lie in a block of {box.size}"
    return None
