"""The end of a run: what it learnt, a sample of its text, the report, where everything lies. One process calls it."""

from megagrok.config import RunConfig
from megagrok.plan import active_params, total_params, world_size
from megagrok.platform import Platform
from megagrok.telemetry.metrics_file import Metrics, read_metrics
from megagrok.telemetry.report import write_report
from megagrok.train.files import RunFiles
from megagrok.train.generate import Sampling, generate_from_run

_PROMPT = "def __init__(self, "
# The reference model holds all weights in one process, in fp32, and goes through all of them again for each token.
_LARGEST_MODEL_THAT_SPEAKS = 200_000_000


def finish_run(run: RunConfig, files: RunFiles, platform: Platform) -> None:
    """Write the report and print the summary."""
    metrics = read_metrics(files.metrics)
    sample = ""
    if files.tokenizer.exists() and total_params(run.model) <= _LARGEST_MODEL_THAT_SPEAKS:
        sample = _PROMPT + generate_from_run(files, _PROMPT, Sampling())
    facts = _facts(run, files, platform)
    write_report(files.report, records=metrics.steps, evaluations=metrics.evaluations, facts=facts, sample=sample)
    print(_summary(run, files, metrics, sample))


def _facts(run: RunConfig, files: RunFiles, platform: Platform) -> dict[str, str]:
    parallel = run.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    return {
        "run": run.name,
        "model": f"{total_params(run.model):,} parameters, {active_params(run.model):,} active per token",
        "ranks": f"{world_size(parallel)} on {platform.describe()}",
        "layout": f"tensor {parallel.tensor}{sequence}, pipeline {parallel.pipeline} x {parallel.virtual_pipeline}, "
        f"context {parallel.context}, expert {parallel.expert}, data {parallel.data}, ZeRO {parallel.zero}",
        "precision": run.train.precision,
        "checkpoints": str(files.checkpoints),
        "metrics": str(files.metrics),
        "configuration": str(files.config),
        "resume": _resume_command(run, files),
    }


def _summary(run: RunConfig, files: RunFiles, metrics: Metrics, sample: str) -> str:
    lines = ["", f"{run.name}: {run.train.steps} steps done."]
    if len(metrics.evaluations) > 1:
        first, last = metrics.evaluations[0], metrics.evaluations[-1]
        lines += [
            f"  held-out loss        {first.loss:.3f} -> {last.loss:.3f} (step {first.step} -> {last.step})",
            f"  held-out perplexity  {first.perplexity:,.1f} -> {last.perplexity:,.1f}",
        ]
    if sample:
        lines += ["", "A sample of its text:", *(f"  | {line}" for line in sample.splitlines()), ""]
    lines += [
        f"  checkpoint  {files.checkpoints}",
        f"  metrics     {files.metrics}",
        f"  report      {files.report}",
    ]
    if run.telemetry.wandb != "off":
        lines.append(f"  W&B         {files.root / 'wandb'} ({run.telemetry.wandb})")
    lines += [f"  resume      {_resume_command(run, files)}"]
    return "\n".join(lines)


def _resume_command(run: RunConfig, files: RunFiles) -> str:
    """What to type to train twice as long."""
    return files.resume_command(f"train.steps={2 * run.train.steps}")
