"""What a difference means: the parameters it hits, the factor it is off by, and the layout's sizes that make it up.

A gradient that lost a collective is not off by a factor at all: then the copies on other ranks are tried, whose sum is
right. A norm that is not the norm of the gradients beside it has counted some parameters too often or not at all.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from megagrok.model.names import EMBEDDING, is_expert, is_norm
from megagrok.verify.witness import Step

_FACTOR_PRECISION = 0.01
_PARTIAL = 1.0e-3
"""A gradient is a multiple of the true one, or a sum of copies is, if the rest is below this share of it."""
_SQUARE_PRECISION = 1.0e-4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a layout."""

    subject: str
    """Parameters that are wrong together, or what else is wrong."""
    step: int
    """The first step, from 1, at which it shows."""
    factor: float | None
    """What is there, over what should be; None where no factor applies."""
    causes: tuple[str, ...]
    """Explanations that fit, the likeliest first; none if nothing fits."""
    example: str = ""
    """One of the parameters; for a norm the one with most weight."""
    num_parameters: int = 1

    def __str__(self) -> str:
        many = f" ({self.num_parameters} parameters, such as {self.example})" if self.num_parameters > 1 else ""
        factor = "" if self.factor is None else f" off by x {self.factor:.4g}"
        causes = ", or ".join(self.causes[:3]) or "no simple expression of the layout's sizes"
        return f"step {self.step}: {self.subject}{many}{factor}: {causes}"


def explain_gradients(
    step_number: int, step: Step, true: Mapping[str, Tensor], wrong: Iterable[str], sizes: Mapping[str, int]
) -> list[Finding]:
    """One finding for each family of parameters that is off for the same reason."""
    families: dict[tuple[str, tuple[str, ...]], list[tuple[str, float]]] = defaultdict(list)
    for name in wrong:
        factor, causes = _explain_gradient(name, step, true[name], sizes)
        families[_family(name), causes].append((name, factor))
    return [
        Finding(subject, step_number, members[0][1], causes, members[0][0], len(members))
        for (subject, causes), members in families.items()
    ]


def _family(name: str) -> str:
    """Parameters that the same mistake would hit: all norms, all experts, or one matrix of all layers."""
    if is_norm(name):
        return "norms"
    return "experts" if is_expert(name) else re.sub(r"\.\d+\.", ".*.", name)


def _explain_gradient(name: str, step: Step, true: Tensor, sizes: Mapping[str, int]) -> tuple[float, tuple[str, ...]]:
    gradient = step.gradients[name]
    factor, rest = projection(gradient, true)
    if rest < _PARTIAL:
        return factor, tuple(name_factor(factor, sizes, first="EP" if is_expert(name) else "TP"))
    copies = step.copies.get(name, [])
    if copies:
        _, rest = projection(total := sum(copies[1:], copies[0]), true)
        if rest < _PARTIAL and abs(projection(total, true)[0] - 1) < _FACTOR_PRECISION:
            where = "the first and the last stage" if name == EMBEDDING else "the tensor ranks"
            return factor, (f"not summed over {where}, each of which has only its part",)
    return factor, ()


def projection(actual: Tensor, true: Tensor) -> tuple[float, float]:
    """The factor f that brings f * true nearest to `actual`, and what then is left, over the norm of `actual`."""
    square = float((true * true).sum())
    if square == 0:
        return math.nan, math.nan
    factor = float((actual * true).sum()) / square
    size = float(actual.norm())
    return factor, float((actual - factor * true).norm()) / size if size else 0.0


def name_factor(factor: float, sizes: Mapping[str, int], *, first: str = "") -> list[str]:
    """Expressions of the layout's sizes within 1 % of the factor: those of one size before those of two, then roots.

    sizes: only those above 1.  first: the size to name first where several are equal.
    """
    if abs(factor) < 1e-6:
        return ["missing: it is zero"]
    ordered = sorted(sizes.items(), key=lambda item: item[0] != first)
    for candidates in (_single(ordered), _double(ordered), _roots(ordered)):
        found = [text for text, value in candidates if abs(factor / value - 1) < _FACTOR_PRECISION]
        if found:
            return list(dict.fromkeys(found))
    return []


def _single(sizes: list[tuple[str, int]]) -> Iterator[tuple[str, float]]:
    for name, size in sizes:
        yield f"x {name}", size
        yield f"/ {name}", 1 / size


def _double(sizes: list[tuple[str, int]]) -> Iterator[tuple[str, float]]:
    for i, (name, size) in enumerate(sizes):
        for other, other_size in sizes[i + 1 :]:
            yield f"x {name} x {other}", size * other_size
            yield f"/ ({name} x {other})", 1 / (size * other_size)
            yield f"x {name} / {other}", size / other_size
            yield f"x {other} / {name}", other_size / size


def _roots(sizes: list[tuple[str, int]]) -> Iterator[tuple[str, float]]:
    for name, size in sizes:
        yield f"x sqrt({name})", math.sqrt(size)
        yield f"/ sqrt({name})", 1 / math.sqrt(size)


def explain_norm(step_number: int, step: Step, sizes: Mapping[str, int]) -> Finding:
    """Why the norm is not that of the gradients beside it. The factor is the norm's."""
    total = sum(step.squares.values())
    ratio = step.updates[0].grad_norm / math.sqrt(total)
    fitting = [
        (abs(square / total - ratio**2), subject, cause)
        for subject, cause, square in _wrong_counts(step.squares, sizes)
        if abs(square / total - 1) > 1e-6 and abs(square / total - ratio**2) < _SQUARE_PRECISION
    ]
    if fitting:
        _, subject, _ = min(fitting)
        causes = tuple(cause for _, other, cause in fitting if other == subject)
        return Finding(f"gradient norm, {subject}", step_number, ratio, causes, _largest(step.squares, subject))
    return Finding("gradient norm", step_number, ratio, tuple(name_factor(ratio, sizes)))


_KINDS = ("experts", "norms and routers", "split matrices")


def _kind(name: str) -> str:
    if is_expert(name):
        return "experts"
    return "norms and routers" if is_norm(name) or name.endswith(".gate.weight") else "split matrices"


def _wrong_counts(
    squares: Mapping[tuple[str, int], float], sizes: Mapping[str, int]
) -> Iterator[tuple[str, str, float]]:
    """What the square of the norm would be, had some kind of parameter been counted wrongly."""
    total = sum(squares.values())
    for kind in _KINDS:
        of_kind = {place: square for place, square in squares.items() if _kind(place[0]) == kind}
        share = sum(of_kind.values())
        beyond = sum(square for (_, tensor_rank), square in of_kind.items() if tensor_rank > 0)
        yield kind, "missing on tensor ranks > 0", total - beyond
        yield kind, "missing", total - share
        for name, size in sizes.items():
            yield kind, f"counted x {name}", total + (size - 1) * share
            yield kind, f"counted / {name}", total - (1 - 1 / size) * share
    embedding = sum(square for (name, _), square in squares.items() if name == EMBEDDING)
    yield EMBEDDING, "counted twice", total + embedding


def _largest(squares: Mapping[tuple[str, int], float], subject: str) -> str:
    """The parameter with most weight on one tensor rank among those that a finding is about."""
    about = {place: square for place, square in squares.items() if subject in (place[0], _kind(place[0]))}
    return max(about, key=lambda place: about[place])[0]
