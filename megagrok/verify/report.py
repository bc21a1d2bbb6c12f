"""What verify-layout says: a line for each layout, the causes below it, and a verdict; or all of it as JSON."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from megagrok.verify import tolerance
from megagrok.verify.breaks import BREAKS
from megagrok.verify.compare import Row
from megagrok.verify.run import Request

_NAME_WIDTH, _PARAMETER_WIDTH = 38, 44


def heading(request: Request) -> str:
    """What is about to be compared, and the head of the table."""
    layouts = request.layouts()
    lines = []
    if request.planted is not None:
        lines.append(f"Planted: {BREAKS[request.planted].story}.")
    limits = (
        f"loss {tolerance.LOSS:.0e}, gradients {tolerance.GRADIENT:.0e} of their norm, "
        f"gradient norm {tolerance.GRAD_NORM:.0e}, weights {tolerance.WEIGHTS:.0e}"
    )
    lines.append(f"{len(layouts)} layouts, {request.steps} steps, fp32, each against the oracle. Allowed: {limits}.")
    lines.append("")
    lines.append(
        f"{'layout':<{_NAME_WIDTH}} ranks {'loss':>7} {'router':>7} {'grad':>7} "
        f"{'worst gradient':<{_PARAMETER_WIDTH}} {'norm':>7} {'weights':>7}   sec  verdict"
    )
    return "\n".join(lines)


def line(row: Row) -> str:
    """One layout, and what is wrong with it."""
    head = f"{row.layout!s:<{_NAME_WIDTH}} {row.layout.num_ranks:>5}"
    if row.differences is None:
        return f"{head} FAILED after {row.seconds:.1f} s: {row.failure}"
    d = row.differences
    verdict = "ok" if row.matches else "MISMATCH: " + ", ".join(d.breaches or ["see below"])
    worst = d.gradient_name.removesuffix(".weight").replace("block_sparse_moe", "moe")
    text = (
        f"{head} {d.loss:7.0e} {d.router_losses:7.0e} {d.gradient:7.0e} {worst:<{_PARAMETER_WIDTH}} "
        f"{d.grad_norm:7.0e} {d.weight:7.0e} {row.seconds:5.1f}  {verdict}"
    )
    causes = [f"    {finding}" for finding in row.findings]
    if not row.matches and not row.findings:
        causes = [f"    gradients and norms are right; {d.weight_name} is not after the last step: the update is wrong"]
    return "\n".join([text, *causes])


def closing(request: Request, rows: Sequence[Row]) -> str:
    """The verdict."""
    wrong = [row for row in rows if not row.matches]
    summary = _common_causes(wrong)
    if request.planted is not None:
        caught = sum(bool(row.findings) for row in rows)
        said = f"{request.planted}: caught on {caught} of {len(rows)} layouts where it can show."
        return "\n".join(["", *summary, said])
    if not wrong:
        return f"\nAll {len(rows)} layouts do the maths of the oracle."
    return "\n".join(["", *summary, f"{len(wrong)} of {len(rows)} layouts do NOT do the maths of the oracle."])


def _common_causes(rows: Sequence[Row]) -> list[str]:
    """For every subject the causes that fit all layouts on which it is off: one layout often has two equal sizes."""
    causes: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for row in rows:
        for finding in row.findings:
            causes[finding.subject].append(finding.causes)
    lines = []
    for subject, found in causes.items():
        common = [cause for cause in found[0] if all(cause in others for others in found)]
        text = ", or ".join(common) if common else "no one cause fits all"
        lines.append(f"{subject}: {text} (on {len(found)} layouts)")
    return lines


def to_json(request: Request, rows: Sequence[Row]) -> str:
    """The same for machines. Numbers that are not finite are null."""
    limits = {
        "loss": tolerance.LOSS,
        "router_losses": tolerance.LOSS,
        "gradient": tolerance.GRADIENT,
        "grad_norm": tolerance.GRAD_NORM,
        "weight": tolerance.WEIGHTS,
    }
    told = {
        "planted": request.planted,
        "steps": request.steps,
        "tolerances": limits,
        "layouts": [_row_to_dict(row) for row in rows],
        "num_mismatches": sum(not row.matches for row in rows),
        "common_causes": _common_causes([row for row in rows if not row.matches]),
    }
    return json.dumps(_finite(told), indent=2, allow_nan=False)


def _row_to_dict(row: Row) -> dict[str, object]:
    return {
        "name": str(row.layout),
        "ranks": row.layout.num_ranks,
        "parallel": asdict(row.layout.parallel),
        "micro_batch": row.layout.micro_batch,
        "is_own": row.layout.is_own,
        "seconds": round(row.seconds, 2),
        "matches": row.matches,
        "differences": None if row.differences is None else asdict(row.differences),
        "breaches": [] if row.differences is None else row.differences.breaches,
        "findings": [asdict(finding) for finding in row.findings],
        "failure": row.failure,
    }


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
