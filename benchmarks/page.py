"""The page of results that train_step.py writes beside its JSON: what was raced, the table, how to race again."""

from pathlib import Path
from typing import Any

_TEXT = """\
# The training step beside its peers

{rounds} rounds in one run of `benchmarks/train_step.py`; every contender takes one step a round, in rotating order, on
the same ranks, in the same layout, with the same batches of random tokens. Median, and (lowest to highest) over the
rounds. A ratio compares steps of the same round; above 1 megagrok is faster.

| contender | parameters | tokens/s | megagrok's tokens/s over it | CPU seconds a step, all ranks | over megagrok's |
|---|---|---|---|---|---|
{rows}

CPU seconds say what a step costs whoever else uses the machine; tokens/s also pays for waiting on each other.

| | |
|---|---|
{facts}

## The contenders

- **megagrok**: the step of `megagrok train`: the Grok model on Megatron-core's schedule, DeepSpeed's expert groups and
  ZeRO optimizer. It does all of Grok: three soft-caps, norms before and after every sub-block.
- **megatron-core GPTModel**: Megatron's own model, `MoELayer` (SequentialMLP, allgather dispatcher: alltoall needs
  CUDA) and DotProductAttention, with the same number of heads, experts and widths and the same schedule and groups. It
  has no soft-caps and half the norms, so it does less. Its optimizer is torch's fused AdamW around one all-reduce for
  the norm, because Megatron's own needs CUDA: less work than Megatron's or DeepSpeed's.
- **deepspeed stock MoE**: megagrok's model and engine with DeepSpeed's `MoE` layer (`drop_tokens=False`, no random
  second expert) in every mlp slot. Its router has no soft-cap and no z-loss and renormalizes. With those settings equal
  both give the same losses (tests/benchmarks/test_train_step.py). The layer assumes that tensor ranks hold copies of
  the same tokens; under sequence parallelism they do not, so it is told that there is no tensor parallelism.

Not comparable: a contender whose parameters differ by more than 2 %, or whose first loss by more than 10 %, is refused.

## Again

```
{command}
```

Settings follow as KEY=VALUE: with `parallel.tensor=1 parallel.sequence=false parallel.data=2 train.micro_batch=2` the
experts are spread over data ranks instead of tensor ranks, and the stock layer runs as its authors meant it to.
"""


def write_page(record: dict[str, Any], path: Path) -> None:
    """Write the results of one run of train_step.py as Markdown."""
    command = " ".join(["python benchmarks/train_step.py", record["config"], *record["overrides"]])
    facts = {
        "device": record["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "load before the race": f"{record['load_before']} runnable processes of others, on average over a minute",
        "commit": record["commit"],
        **record["shapes"],
    }
    text = _TEXT.format(
        rounds=record["repeats"],
        rows="\n".join(_row(contender) for contender in record["contenders"]),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        command=f"{command} --repeats {record['repeats']} --json docs/bench/train_step.json",
    )
    path.write_text(text, encoding="utf-8")


def _row(contender: dict[str, Any]) -> str:
    cells = [
        contender["name"],
        f"{contender['params']:,}",
        _spread(contender["tokens_per_second"], "{:,.0f}"),
        _spread(contender["ratio"], "{:.2f}"),
        _spread(contender["cpu_seconds_per_step"], "{:.2f}"),
        _spread(contender["cpu_ratio"], "{:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(spread: dict[str, float], form: str) -> str:
    return f"{form.format(spread['median'])} ({form.format(spread['min'])} to {form.format(spread['max'])})"


def relative(config: Path) -> str:
    """Without the folder of whoever ran it."""
    path, root = config.resolve(), Path(__file__).resolve().parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name
