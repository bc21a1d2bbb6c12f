"""Where a run keeps its things: one folder, fixed names."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megagrok.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Paths inside the folder of one run. Nothing is created by asking."""

    root: Path

    @classmethod
    def of(cls, run: RunConfig) -> "RunFiles":
        """The folder runs_dir/name."""
        return cls(Path(run.runs_dir) / run.name)

    @property
    def checkpoints(self) -> Path:
        """step-* folders."""
        return self.root / "checkpoints"

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML; what `megagrok resume` reads."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The page with the pictures."""
        return self.root / "report.html"

    @property
    def tokenizer(self) -> Path:
        """Copy of the tokenizer, so that the run can speak without its data."""
        return self.root / "tokenizer.json"

    @property
    def lease(self) -> Path:
        """Says which start of the run holds the folder."""
        return self.root / "lease.json"

    @property
    def lock(self) -> Path:
        """Held for a moment while the lease changes hands."""
        return self.root / "lease.lock"

    @property
    def ledger(self) -> Path:
        """Which samples each step used, a file for each data rank."""
        return self.root / "ledger"

    def resume_command(self, *settings: str) -> str:
        """What to type to go on with the run from here."""
        return shlex.join(["megagrok", "resume", str(self.root), *settings])

    def bad_step(self, step: int) -> Path:
        """The documents of a step that was refused."""
        return self.root / "bad" / f"{step}.json"
