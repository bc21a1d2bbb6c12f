"""Whether a step is one to learn from, and if not, what becomes of it. Decided alike by all ranks, before weights move.

Not the watch over hanging ranks. The one idea: losses and norms are equal on all ranks already, so every rank comes to
the same verdict by itself, and what it looks back at is saved with the run, so that a resumed run comes to it too.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megagrok.config.schema import GuardConfig
from megagrok.errors import CheckpointError
from megagrok.parallel.ranks import JSON

Decision = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Why a step is not learnt from."""

    reason: str
    """With the numbers, as a person reads it."""
    is_spike: bool
    """Finite, but far above what was; otherwise not finite."""
    decision: Decision
    loss: float
    grad_norm: float
    """NaN where it was not computed, or is none."""
    mean: float | None
    """Of the loss, or of the norm if that is what spiked, over the window of good steps; None of an empty one."""
    std: float | None


class Guard:
    """The window of good steps and the bad ones in a row. One on each rank; nothing is exchanged."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._norms: deque[float] = deque(maxlen=config.window_steps)
        self._in_a_row, self._last_bad = 0, 0

    @property
    def needs_norm(self) -> bool:
        """Whether `judge` looks at the gradient's norm; what is not finite the engine refuses by itself."""
        return self._config.on_spike != "ignore"

    def judge(self, step: int, loss: float, grad_norm: float | None) -> Verdict | None:
        """The verdict on a step whose gradients are whole; None if it is to be learnt from.

        grad_norm: None where it is not known yet. A bad step counts towards guard.max_in_a_row.
        """
        for name, value, window in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            if value is not None and not math.isfinite(value):
                return self.refuse(step, f"the {name} is {value:g}", loss, grad_norm)
            if value is not None and self.needs_norm and self._is_spike(value, window):
                mean, std = _mean_and_std(window)
                reason = f"the {name} is {value:.6g}, {mean:.6g} +- {std:.3g} over the {len(window)} good steps before"
                return self._verdict(step, reason, True, loss, grad_norm, window)
        return None

    def refuse(self, step: int, reason: str, loss: float, grad_norm: float | None) -> Verdict:
        """The verdict on a step whose loss or gradient is not finite."""
        return self._verdict(step, reason, False, loss, grad_norm, self._losses)

    def accept(self, step: int, loss: float, grad_norm: float) -> None:
        """The step was good, and its update is done."""
        self._losses.append(loss)
        self._norms.append(grad_norm)
        # After a rewind the steps up to the bad one come again: they are not what shows that it is over.
        if step >= self._last_bad:
            self._in_a_row = 0

    def state_dict(self) -> dict[str, JSON]:
        """What a resumed run has to know to decide alike; JSON, equal on all ranks."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "last_bad": self._last_bad,
        }

    def load_state(self, state: JSON) -> None:
        """Take over a saved state; None is that of a run that was saved without one. Raises CheckpointError."""
        self.load_window(state)
        if isinstance(state, Mapping):
            self._in_a_row, self._last_bad = int(str(state["in_a_row"])), int(str(state["last_bad"]))

    def load_window(self, state: JSON) -> None:
        """Only what it looks back at: after a rewind the bad steps in a row stay counted. None empties it."""
        try:
            state = {"losses": [], "norms": []} if state is None else state
            assert isinstance(state, Mapping)
            losses, norms = state["losses"], state["norms"]
            assert isinstance(losses, list) and isinstance(norms, list)
            self._losses = deque(map(float, losses), maxlen=self._config.window_steps)
            self._norms = deque(map(float, norms), maxlen=self._config.window_steps)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved state of the guard cannot be used: {error!r}") from error

    def _is_spike(self, value: float, window: deque[float]) -> bool:
        if len(window) < max(2, self._config.window_steps // 4):
            return False
        mean, std = _mean_and_std(window)
        return value > mean + self._config.spike_sigmas * std

    def _verdict(
        self, step: int, reason: str, is_spike: bool, loss: float, grad_norm: float | None, window: deque[float]
    ) -> Verdict:
        self._in_a_row, self._last_bad = self._in_a_row + 1, step
        policy = self._config.on_spike if is_spike else self._config.on_nonfinite
        assert policy != "ignore"
        decision: Decision = policy
        if self._in_a_row > self._config.max_in_a_row:
            decision = "stop"
            reason += f"; it is bad step {self._in_a_row} without a good one between (guard.max_in_a_row)"
        mean, std = _mean_and_std(window) if len(window) > 1 else (None, None)
        return Verdict(
            reason=reason,
            is_spike=is_spike,
            decision=decision,
            loss=loss,
            grad_norm=float("nan") if grad_norm is None else grad_norm,
            mean=mean,
            std=std,
        )


def _mean_and_std(window: deque[float]) -> tuple[float, float]:
    mean = math.fsum(window) / len(window)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in window) / len(window))
