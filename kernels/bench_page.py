"""The bench's JSON record as a page. Pure: it computes nothing that the record does not say."""

from typing import Any

JSON = dict[str, Any]


def render(record: JSON) -> str:
    """The whole page."""
    roofline, versions = record["roofline"], record["versions"]
    lines = [
        "# Kernels: op x implementation x shape",
        "",
        "Rebuilt by one command:",
        "`python -m megagrok.kernels.bench --all --json docs/bench/kernels.json --page docs/bench/kernels.md`.",
        "Forward and backward. All of a case ran in paired rounds of rotating order; a ratio is the median of ratios",
        "within a round. An operation is timed only if its tests are green in the same run.",
        "",
        f"- Device: {record['device']}; {record['precision']}; load {record['load_before']} in the minute before.",
        f"- Roofline, measured: {_rate(roofline['flops_per_second'], 'FLOP/s')} of square matmuls, "
        f"{_rate(roofline['bytes_per_second'], 'B/s')} of a copy. Share: the slower of a case's FLOPs and least bytes "
        "at these rates, over the time.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"commit {record['commit']}.",
        f"- The whole took {record['seconds']} s.",
        "",
    ]
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        lines += [f"## {op}", ""]
        for case in record["cases"]:
            if case["op"] == op:
                lines += _case(case)
    if record["refused"]:
        lines += ["## Not timed", ""]
        lines += [f"- {op}: {why}" for op, why in record["refused"].items()] + [""]
    return "\n".join(lines + (_layer_peers(record) if any(case["op"] == "layer" for case in record["cases"]) else []))


def _layer_peers(record: JSON) -> list[str]:
    return [
        "## Peers of the layer",
        "",
        "Same x, same router, same experts; each one's result and gradient of x are compared with ours before it is",
        "timed. No balance or z-loss is trained on. Skew is made by the first feature of x, +16 in every second token",
        "and -16 in the others, which the router's row of expert 0 alone reads. Floor: all rows through one expert's",
        "matmuls, forward and backward, and nothing between.",
        "",
        *(f"- {name}: {differs}." for name, differs in record["layer_peers"].items()),
        "",
    ]


def _case(case: JSON) -> list[str]:
    best = case["best_peer"]
    versus = f"x as fast as {best}" if best else "x as fast as a peer"
    lines = [
        f"### {case['shape']}",
        "",
        f"| implementation | ms: median (lowest to highest) | achieved | of roofline | {versus} | kept for backward |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(case["rows"], key=lambda row: float(row["median_seconds"])):
        name = {"ours": f"**{row['name']}**", "floor": f"*{row['name']}*"}.get(row["kind"], row["name"])
        ratio = row["times_as_fast_as_best_peer"]
        lines.append(
            f"| {name} | {_milliseconds(row)} | {_achieved(case, row)} | {row['share_of_roofline']:.0%} "
            f"| {'-' if ratio is None else format(ratio, '.2f')} "
            f"| {'-' if row['kind'] == 'floor' else format(row['saved_bytes'] / 1e6, ',.1f') + ' MB'} |"
        )
    lines += ["", *(f"- {name}: {why}." for name, why in case["absent"].items())]
    lines += [f"- **{name} failed**: {why}." for name, why in case["broken"].items()]
    return lines if lines[-1] == "" else [*lines, ""]


def _milliseconds(row: JSON) -> str:
    digits = 1 if row["median_seconds"] > 0.01 else 3
    middle, low, high = (
        f"{value * 1e3:,.{digits}f}" for value in (row["median_seconds"], min(row["seconds"]), max(row["seconds"]))
    )
    return f"{middle} ({low} to {high})"


def _achieved(case: JSON, row: JSON) -> str:
    amount, unit = (case["flops"], "FLOP/s") if case["flops"] else (case["bytes"], "B/s")
    return _rate(amount / row["median_seconds"], unit)


def _rate(value: float, unit: str) -> str:
    scale, letter = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:,.1f} {letter}{unit}"
