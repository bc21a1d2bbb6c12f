"""The page that `megagrok bench compare` writes beside its JSON: the table, who is who, how to race again."""

from typing import Any

from megagrok.bench.peers import PEERS
from megagrok.bench.spread import Spread

_TEXT = """\
# The training step beside its peers

{rounds} rounds in one run of `megagrok bench compare`; every contender takes one step a round, in rotating order, on
the same ranks, in the same layout, with the same batches of random tokens. Median, and (lowest to highest) over the
rounds. A ratio compares steps of the same round; above 1 megagrok is faster.

| contender | parameters | tokens/s | MFU | megagrok's tokens/s over it | CPU seconds a step | over megagrok's |
|---|---|---|---|---|---|---|
{rows}

CPU seconds are those of all ranks together: what a step costs, whoever else uses the machine; tokens/s also pays for
waiting on each other. MFU: the FLOPs that `megagrok describe` counts, over {peak} of plain matmuls, measured
between the rounds on all ranks at the same time.

| | |
|---|---|
{facts}

## The contenders

{contenders}

Not comparable: a contender whose parameters differ by more than 2 %, or whose first loss by more than 10 %, is refused.

## Again

```
{command}
```

Settings follow as KEY=VALUE. Peers that are data-parallel only sit out a layout with tensor or pipeline ranks.
"""


def to_page(record: dict[str, Any]) -> str:
    """The results of one race as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = {
        "device": record["device"],
        "versions": versions,
        "load before the race": f"{record['load_before']} runnable processes of others, on average over a minute",
        "commit": record["commit"],
        **record["shapes"],
    }
    absent = [f"| {row['name']} | | not run: {row['reason']} | | | | |" for row in record["absent"]]
    return _TEXT.format(
        rounds=record["rounds"],
        rows="\n".join([*(_row(contender) for contender in record["contenders"]), *absent]),
        peak=f"{record['matmul_flops'] / 1e9:,.1f} GFLOP/s",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        contenders="\n".join(f"- **{peer.title}**: {peer.differs}." for peer in PEERS.values()),
        command=record["command"],
    )


def _row(contender: dict[str, Any]) -> str:
    cells = [
        contender["name"],
        f"{contender['params']:,}",
        Spread(**contender["tokens_per_second"]).in_words("{:,.0f}"),
        f"{contender['mfu']:.1%}",
        Spread(**contender["ratio"]).in_words("{:.2f}"),
        Spread(**contender["cpu_seconds_per_step"]).in_words("{:.2f}"),
        Spread(**contender["cpu_ratio"]).in_words("{:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"
