"""The page of results that checkpoint.py writes beside its JSON."""

from pathlib import Path
from typing import Any

from megagrok.bench.spread import Spread

_TEXT = """\
# Saving beside torch.distributed.checkpoint

{rounds} rounds in one run of `benchmarks/checkpoint.py`; every contender saves the same {megabytes:,.0f} MB ({tensors}
fp32 tensors, {ranks} ranks) once a round, in rotating order, to the same disk, with every file synced. Median, and
(lowest to highest) over the rounds. A ratio compares saves of the same round; above 1 megagrok is better.

| contender | a step is held (s) | over megagrok's | on the disk after (s) | over megagrok's | GB/s | CPU s, all ranks |
|---|---|---|---|---|---|---|
{rows}

The ratios of the contenders that write in the background are to megagrok's in the background, that of `DCP save` to
megagrok's save that is waited for. CPU seconds say what a save costs whoever else uses the machine.

| | |
|---|---|
{facts}

## The contenders

- **megagrok**: what a run does. The step waits while its tensors are copied to a host buffer that is allocated once; a
  thread hashes every byte twice (each tensor, each file; xxh3, 128 bits), writes and syncs the shards, gathers what
  was written, checks that every tensor is covered exactly once, and commits. `waited for` does the same without thread
  and with a buffer of 8 MiB.
- **DCP async_save**: `torch.distributed.checkpoint.async_save` as its documentation shows it, over a gloo group of its
  own. `kept stager` is the same with its default stager made once and handed to every call, which keeps the host copy
  for the next save, as megagrok does; then both are bound by the same copy. (Its pinned and asynchronous staging, and
  `cache_staged_state_dict`, need an accelerator.)
- **DCP save**: `torch.distributed.checkpoint.save`.

DCP gets plain tensors with a name on one rank each, which spares it the planning of shards; it computes no digests.
Old checkpoints are removed off the clock.

## Again

```
python benchmarks/checkpoint.py --rounds {rounds} --json docs/bench/checkpoint.json
```
"""


def write_page(record: dict[str, Any], path: Path) -> None:
    """Write the results of one run of checkpoint.py as Markdown."""
    facts = {
        "device": record["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "load before the race": f"{record['load_before']} runnable processes of others, on average over a minute",
        "commit": record["commit"],
    }
    text = _TEXT.format(
        rounds=record["rounds"],
        megabytes=record["bytes"] / 1e6,
        tensors=record["tensors"],
        ranks=record["ranks"],
        rows="\n".join(_row(contender) for contender in record["contenders"]),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )
    path.write_text(text, encoding="utf-8")


def _row(contender: dict[str, Any]) -> str:
    cells = [
        contender["name"],
        Spread(**contender["stall_seconds"]).in_words("{:.3f}"),
        Spread(**contender["stall_ratio"]).in_words("{:.1f}"),
        Spread(**contender["total_seconds"]).in_words("{:.2f}"),
        Spread(**contender["total_ratio"]).in_words("{:.2f}"),
        Spread(**contender["gigabytes_per_second"]).in_words("{:.2f}"),
        Spread(**contender["cpu_seconds"]).in_words("{:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"
