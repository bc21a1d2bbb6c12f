"""The plans of the 286 B model in docs/plan, made anew: what `megagrok plan` prints, and the files of the winners.

python -m benchmarks.plan_tables
"""

from pathlib import Path

from megagrok.config.schema import Precision
from megagrok.plan.proposal import Proposal, Request, propose
from megagrok.plan.proposal_text import layout_words, run_file_comment, to_text
from megagrok.plan.run_file import run_file

CONFIG = Path("configs/run/pretrain-286b.yaml")
PAGE = Path("docs/plan/grok2-286b.md")
RUNS = Path("docs/plan/winners")
GPU = "h100"
SIZES = (64, 512, 1024, 4096)
TRITON_ATTENTION = "kernels.attention=triton"
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
GIB = 2**30


def main() -> None:
    """Write the page and a run file for each plan that fits. Paths on the page are relative to the repository."""
    asked = [(gpus, precision) for gpus in SIZES for precision in PRECISIONS]
    proposals = {case: propose(_request(*case)) for case in asked}
    on_chip = {gpus: propose(_request(gpus, "bf16", TRITON_ATTENTION)) for gpus in SIZES}
    RUNS.mkdir(parents=True, exist_ok=True)
    for (gpus, precision), proposal in proposals.items():
        path = _run_path(gpus, precision)
        path.unlink(missing_ok=True)
        if proposal.found.best:
            best = proposal.found.best[0]
            path.write_text(run_file(CONFIG, best.run, RUNS, run_file_comment(proposal, best)), encoding="utf-8")
    PAGE.write_text(page(proposals, on_chip), encoding="utf-8")
    print(f"{PAGE} and {RUNS}")


def page(proposals: dict[tuple[int, Precision], Proposal], on_chip: dict[int, Proposal]) -> str:
    """The whole page. on_chip: with the kernel that keeps attention's scores on chip."""
    heads = "GPUs | precision | best layout | peak GiB | step s | MFU % | tokens/day | days to 15 T | GPU-hours"
    lines = [
        "# Plans for the 286 B model on H100s",
        "",
        "Predictions of `megagrok plan configs/run/pretrain-286b.yaml --gpus N --gpu h100 --precision P`: nothing here",
        "was measured. [README.md](README.md) says how to read it, [validation.md](validation.md) how far such",
        "predictions were off. Made by `python -m benchmarks.plan_tables`, which also writes the winners as run files",
        "into [winners](winners).",
        "",
        f"| {heads} |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(gpus, precision, proposal) for (gpus, precision), proposal in proposals.items()),
        "",
        f"The same with `{TRITON_ATTENTION}`. No GPU has run that kernel yet, so `auto` is torch and the shipped run",
        "does not name it; its rate is predicted ([kernels](../bench/kernels-h100-predicted.md)):",
        "",
        f"| {heads} |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(gpus, "bf16", proposal, has_file=False) for gpus, proposal in on_chip.items()),
    ]
    for (gpus, precision), proposal in proposals.items():
        lines += ["", f"## {gpus:,} GPUs, {precision}", "", "```", to_text(proposal), "```"]
    return "\n".join(lines) + "\n"


def _row(gpus: int, precision: Precision, proposal: Proposal, has_file: bool = True) -> str:
    if not proposal.found.best:
        nearest = proposal.found.nearest
        assert nearest is not None and proposal.enough_gpus is not None
        what = (
            f"nothing fits; the nearest: {layout_words(nearest.estimate.layout)}. {proposal.enough_gpus:,} GPUs hold it"
        )
        return f"| {gpus:,} | {precision} | {what} | {nearest.estimate.peak_bytes / GIB:.1f} | | | | | |"
    best, bill = proposal.found.best[0].estimate, proposal.bill
    assert bill is not None
    words = layout_words(best.layout)
    cells = (
        f"{gpus:,}",
        precision,
        f"[{words}](winners/{_run_path(gpus, precision).name})" if has_file else words,
        f"{best.peak_bytes / GIB:.1f}",
        f"{best.seconds.total:.1f}",
        f"{100 * best.mfu:.1f}",
        f"{best.tokens_per_second * 86_400 / 1e9:.1f} B",
        f"{bill.days:,.0f}",
        f"{bill.gpu_hours:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _run_path(gpus: int, precision: Precision) -> Path:
    return RUNS / f"grok2-286b-{gpus}-{GPU}-{precision}.yaml"


def _request(gpus: int, precision: Precision, *overrides: str) -> Request:
    return Request(
        config=CONFIG,
        overrides=overrides,
        gpus=gpus,
        gpu=GPU,
        gpus_per_node=8,
        network_bandwidth=None,
        seq_len=None,
        precisions=(precision,),
        tokens=None,
        dollars_per_gpu_hour=None,
        dollars_per_kilowatt_hour=None,
        calibration=None,
        top=5,
    )


if __name__ == "__main__":
    main()
