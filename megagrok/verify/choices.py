"""What a user of verify-layout can choose, by name. No torch, so that the command's help answers at once."""

from typing import Literal, get_args

GridName = Literal["default", "quick"]
GRID_NAMES: tuple[GridName, ...] = get_args(GridName)

BreakName = Literal["expert-scale", "sp-norm", "tied-embedding", "clip-norm"]
BREAK_NAMES: tuple[BreakName, ...] = get_args(BreakName)
