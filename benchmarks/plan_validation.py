"""docs/plan/validation.md: how far the planner is from published runs that its constants have not seen.

    python -m benchmarks.plan_validation                     # rebuild the page: one fit for each source, minutes
    python -m benchmarks.plan_validation --runs OTHER.csv    # predict runs that are in no fit

OTHER.csv has the columns of docs/plan/published-runs.csv.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import published_memory
from benchmarks.plan_fit import START, fit, leave_one_source_out, predict
from benchmarks.published_runs import PublishedRun, load_runs
from megagrok.plan.constants import CONSTANTS
from megagrok.plan.flops import training_flops_per_token
from megagrok.plan.step_time import step_seconds

PAGE = Path(__file__).parent.parent / "docs/plan/validation.md"
MEMORY = (
    "No constant is fitted. nanotron's figure is the peak of the update: weights, gradients, optimizer state and "
    "buffers; Megatron-Bridge's is the peak of the step. The goals were 5 % for weights and optimizer, 10 % for all "
    "that is allocated. Moonlight's recipe keeps AdamW's moments in bf16, which its rows do not say: the last column "
    "has them."
)
FAR_OFF = 0.25
GOAL = 0.10
CALCULON = (0.0365, 0.0887)
"""Mean and worst error of batch time that Calculon has on its eight Megatron A100 points, dense, as run again."""
Errors = dict[int, float]

WHY: tuple[tuple[Callable[[PublishedRun], bool], str], ...] = (
    (
        lambda run: run.layout.num_micro_batches == 1 and bool(run.shape.experts),
        "one micro-batch a step, 2,048 tokens a GPU: more than half of the step is the host, which this page alone "
        "shows; left out, nothing else tells how long a layer's kernels take to launch",
    ),
    (
        lambda run: run.layout.context > 4,
        "sequences of 65,536 and more; the source prints these rows twice for two models, and tokens per second were "
        "computed back from an MFU that counts the whole attention square",
    ),
    (
        lambda run: "G8T8" in run.model,
        "64 experts in 1,024 tokens a rank: predicted to wait for the host, as Moonlight and Qwen3-30B do; "
        "this trainer launches less",
    ),
    (
        lambda run: run.shape.heads * run.shape.head_dim != run.shape.hidden and run.shape.hidden % 128 != 0,
        "hidden 2,880 is no multiple of 128, heads are 64 wide, layers look back 128 tokens in turn: none of it is in "
        "the columns' formulas",
    ),
    (
        lambda run: run.layout.precision == "fp8" and run.shape.experts > 16,
        "experts of width 768 in fp8: predicted to wait for the host; how much the recipe's CUDA graphs cover is not "
        "in the row",
    ),
    (
        lambda run: "OneForwardOneBackward" in run.notes and run.layout.pipeline > 2,
        "nanotron's pipeline sends shapes ahead of each tensor and waits; hops are fitted on Megatron's",
    ),
    (
        lambda run: run.layout.zero == 3,
        "torch-native FSDP: what is compiled or fused is not stated",
    ),
    (
        lambda run: run.shape.experts > 0 and run.layout.precision == "bf16",
        "the only large bf16 MoE runs on Megatron: without them, matmul rates come from trainers that are slower",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, metavar="CSV", help="predict these with the constants as they are")
    options = parser.parse_args()
    if options.runs is None:
        PAGE.write_text(validation_page(), encoding="utf-8")
        print(f"wrote {PAGE}")
        return
    runs, incomplete = load_runs(options.runs)
    errors = {run.line: predict(run, CONSTANTS) / run.tokens_per_second - 1 for run in runs}
    print(_table(("row", "published", "predicted", "error", "tag"), (_row(run, errors) for run in runs)))
    for title, chosen in (("all", runs), ("untagged", [run for run in runs if not run.tag])):
        if chosen:
            print(f"\n{title}: {_told(chosen, errors)}")
    print("".join(f"\nline {line} is incomplete: {reason}" for line, reason in incomplete.items()))


def validation_page() -> str:
    """The page, from the runs of docs/plan/published-runs.csv."""
    runs, incomplete = load_runs()
    held = [run for run in runs if not run.tag]
    fitted = fit(held)
    seen = {run.line: predict(run, fitted) / run.tokens_per_second - 1 for run in runs}
    unseen = {
        line: speed / next(run.tokens_per_second for run in runs if run.line == line) - 1
        for line, speed in leave_one_source_out(runs).items()
    }
    on_h100 = [run for run in runs if run.machine.gpu.name == "h100"]
    by_title = {run.title: run for run in sorted(held, key=lambda run: abs(unseen[run.line]))}
    worst = sorted(by_title.values(), key=lambda run: -abs(unseen[run.line]))[:10]
    families = sorted({family for run in on_h100 for family in run.families})
    other_gpu = [run for run in runs if run not in on_h100]
    sections = [
        "# Predicted against published step times",
        "Rebuilt by `python -m benchmarks.plan_validation` from [published-runs.csv](published-runs.csv). "
        f"Of its {len(runs) + len(incomplete)} rows, {len(on_h100)} are complete and ran on H100 80 GB SXM; "
        f"{len(on_h100) - len(held)} of these carry a tag (below) and take no part in a fit. Error: predicted over "
        "published tokens per second, less 1. **Left out**: each source is predicted by constants fitted to the others "
        "only. Nothing is looked up by a model's name, and no constant belongs to a row.",
        "## Result\n\n" + _result(held, on_h100, seen, unseen),
        "## Beside trivial predictions\n\n" + _baselines(held, unseen),
        "## By family, left out\n\n"
        + _table(
            ("family", "runs", "MAPE", "median", "bias", "worst"),
            (_summary(name, [run for run in held if name in run.families], unseen) for name in families),
        )
        + "\n\n"
        + "".join(
            f"{run.title} on H800 (a whole run's average, failures included): {unseen[run.line]:+.0%}, "
            "with constants of H100 runs.\n"
            for run in other_gpu
        ),
        "## By source, left out\n\n"
        + _table(
            ("source", "runs", "MAPE", "median", "bias", "worst"),
            (
                _summary(source, [run for run in held if run.source == source], unseen)
                for source in dict.fromkeys(run.source for run in held)
            ),
        ),
        "## The worst ten, left out\n\nOf jobs that several rows publish, the worst row.\n\n"
        + _table(
            ("row", "published", "predicted", "error", "most of the predicted step", "why"),
            (
                (*_row(run, unseen)[:4], _parts(run), next((why for is_it, why in WHY if is_it(run)), "not understood"))
                for run in worst
            ),
        ),
        "## Tagged\n\nBy what was published, never by an error; the constants have not seen them.\n\n"
        + _table(("row", "published", "predicted", "error", "tag"), (_row(run, unseen) for run in on_h100 if run.tag)),
        "## Memory\n\n" + MEMORY + "\n\n" + "\n".join(published_memory.page(published_memory.memory_rows(runs))),
        "## Constants\n\nFitted to all untagged runs; `megagrok/plan/constants.py` has these values.\n\n"
        + _table(
            ("constant", "from", "fit"),
            ((name, f"{START[name][0]:.3g}", f"{asdict(fitted)[name]:.3g}") for name in START),
        ),
        "## Incomplete rows\n\n"
        + "\n".join(
            f"- {reason}: {sum(other == reason for other in incomplete.values())}"
            for reason in dict.fromkeys(incomplete.values())
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _result(held: Sequence[PublishedRun], all_runs: Sequence[PublishedRun], seen: Errors, unseen: Errors) -> str:
    moe = [run for run in held if run.shape.experts]
    rows = [
        _summary("untagged, left out", held, unseen),
        _summary("untagged MoE, left out", moe, unseen),
        _summary("untagged, in the fit", held, seen),
        _summary("all, tagged too, left out", all_runs, unseen),
    ]
    far = [run for run in held if abs(unseen[run.line]) > FAR_OFF]
    mape = _mape(held, unseen)
    verdict = (
        f"The goal was a MAPE of at most {GOAL:.0%} and no row above {FAR_OFF:.0%}. Left out, it is {mape:.1%} with "
        f"{len(far)} rows above: the goal is {'met' if mape <= GOAL and not far else 'missed'}."
    )
    return f"{_table(('runs', 'number', 'MAPE', 'median', 'bias', 'worst'), rows)}\n\n{verdict}"


def _baselines(held: Sequence[PublishedRun], unseen: Errors) -> str:
    def tflops(run: PublishedRun) -> float:
        return run.tokens_per_second * training_flops_per_token(run.shape, run.layout.seq_len)

    def guess(run: PublishedRun, others: list[PublishedRun]) -> float:
        if not others:
            return float("nan")
        return statistics.median(map(tflops, others)) / tflops(run) - 1

    by_source = {run.line: guess(run, [o for o in held if o.source != run.source]) for run in held}
    by_model = {run.line: guess(run, [o for o in held if o.model == run.model and o is not run]) for run in held}
    known = [run for run in held if by_model[run.line] == by_model[run.line]]
    rows = [
        _summary("this planner", held, unseen),
        _summary("median FLOP/s of the other sources", held, by_source),
        _summary("median FLOP/s of the other rows of the same model", known, by_model),
    ]
    mean, worst = CALCULON
    return (
        _table(("prediction", "runs", "MAPE", "median", "bias", "worst"), rows)
        + f"\n\nCalculon, on its eight dense A100 points, with constants made for them: MAPE {mean:.2%}, worst "
        f"{worst:.2%}. No other tool publishes an error for MoE runs on H100 that it can predict without a GPU."
    )


def _mape(runs: Sequence[PublishedRun], errors: Errors) -> float:
    return statistics.mean(abs(errors[run.line]) for run in runs)


def _told(runs: Sequence[PublishedRun], errors: Errors) -> str:
    _, count, mape, median, bias, worst = _summary("", runs, errors)
    return f"{count} runs, MAPE {mape}, median {median}, bias {bias}, worst {worst}"


def _summary(name: str, runs: Sequence[PublishedRun], errors: Errors) -> tuple[str, ...]:
    of = [errors[run.line] for run in runs]
    return (
        name,
        str(len(of)),
        f"{statistics.mean(map(abs, of)):.1%}",
        f"{statistics.median(map(abs, of)):.1%}",
        f"{statistics.mean(of):+.1%}",
        f"{max(of, key=abs):+.0%}",
    )


def _row(run: PublishedRun, errors: Errors) -> tuple[str, ...]:
    predicted = run.tokens_per_second * (1 + errors[run.line])
    name = f"{run.line}: {run.title}"
    return name, f"{run.tokens_per_second:,.0f}", f"{predicted:,.0f}", f"{errors[run.line]:+.0%}", run.tag


def _parts(run: PublishedRun) -> str:
    seconds = step_seconds(run.shape, run.layout, run.machine, run.habits)
    parts = sorted(asdict(seconds).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {value / seconds.total:.0%}" for name, value in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
