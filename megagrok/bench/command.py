"""`megagrok bench` and `megagrok bench compare`, from their options to what they print."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megagrok.bench import report
from megagrok.bench.compare_page import to_page
from megagrok.bench.machine import describe_machine, describe_shapes, relative
from megagrok.bench.measure import Request, measure
from megagrok.bench.peers import OURS, PEERS
from megagrok.bench.race import race, refuse_what_a_peer_cannot_do
from megagrok.config import RunConfig, decode_config
from megagrok.errors import ConfigError
from megagrok.plan import require_runnable


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A configuration as it was asked for."""

    config: Path
    overrides: list[str]
    world: int | None = None

    def load(self) -> RunConfig:
        """Checked. With `world`, as many data ranks as make it. Raises ConfigError."""
        loaded = decode_config(self.config, self.all_overrides)
        require_runnable(loaded)
        return loaded.config

    @property
    def all_overrides(self) -> list[str]:
        """Those given, and the one that `world` means."""
        if self.world is None:
            return list(self.overrides)
        parallel = decode_config(self.config, self.overrides).config.parallel
        copy = parallel.tensor * parallel.context * parallel.pipeline
        if self.world % copy:
            raise ConfigError(
                f"--world {self.world} does not divide into copies of the model of {copy} ranks (tensor * context * "
                f"pipeline). Fix: --world {max(copy, self.world // copy * copy)}, or another layout."
            )
        return [*self.overrides, f"parallel.data={self.world // copy}"]

    def command(self, name: str, *options: str) -> str:
        """What to type to measure it again."""
        return " ".join([f"megagrok {name}", relative(self.config), *self.all_overrides, *options])


def bench(subject: Subject, request: Request, json_file: Path | None) -> None:
    """Measure and print; with a file, leave the record there and a page beside it. Raises as `measure` does."""
    load_before = os.getloadavg()[0]
    run = subject.load()
    measured = measure(run, request)
    print(report.to_text(measured))
    if json_file is not None:
        options = (
            f"--steps {request.steps} --warmup {request.warmup} --routing {request.routing} --data {request.data} "
            f"--json {json_file}"
        )
        facts = {**describe_machine(load_before), **describe_shapes(run)}
        report.write(measured, request, facts, subject.command("bench", options), json_file)


def compare(subject: Subject, names: Sequence[str], rounds: int, json_file: Path | None) -> None:
    """Race and print; with a file, leave the record there and a page beside it. Raises as `race` does."""
    load_before = os.getloadavg()[0]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ConfigError(f"no peer {', '.join(unknown)}; there are: {', '.join(list(PEERS)[1:])}")
    run = subject.load()
    refuse_what_a_peer_cannot_do(run)
    reasons = {name: PEERS[name].why_not(run) for name in PEERS if name in (OURS, *names)}
    results, matmul_flops = race(run, [name for name, reason in reasons.items() if reason is None], rounds)
    absent = {PEERS[name].title: reason for name, reason in reasons.items() if reason is not None}
    for result in results:
        print(
            f"{result.name:32} {result.tokens_per_second.median:8.0f} tokens/s, MFU {result.mfu:.1%}, "
            f"megagrok / it = {result.ratio.in_words('{:.2f}')}, "
            f"CPU {result.cpu_seconds_per_step.median:.2f} s a step ({result.cpu_ratio.median:.2f} of megagrok's)"
        )
    for title, reason in absent.items():
        print(f"{title:32} not run: {reason}")
    if json_file is not None:
        options = ("--peers " + " ".join(names), f"--rounds {rounds}", f"--json {json_file}")
        record = {
            "command": subject.command("bench compare", *options),
            "rounds": rounds,
            **describe_machine(load_before),
            "shapes": describe_shapes(run),
            "matmul_flops": matmul_flops,
            "contenders": [asdict(result) for result in results],
            "absent": [{"name": title, "reason": reason} for title, reason in absent.items()],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        json_file.with_suffix(".md").write_text(to_page(record), encoding="utf-8")
