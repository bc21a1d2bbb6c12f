"""Weights & Biases, through its own client. A copy of the metrics for people to look at; never part of the run.

One idea: nothing that W&B does can hold or end a step. `log` puts a record on a bounded queue and returns; one daemon
thread imports the client (about a second), starts it (another) and feeds it. The first exception there is one warning,
and the tracker is off from then on: metrics.jsonl still has everything.

    training thread --log--> queue (bounded, drops) --> thread: login, init, log ..., finish

The API key is read by the client itself (WANDB_API_KEY or ~/.netrc) and never passes through megagrok.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from megagrok.config.schema import TelemetryConfig
from megagrok.telemetry.expert_load import imbalance
from megagrok.telemetry.records import EvaluationRecord, GuardRecord, Record

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

QUEUE_RECORDS = 10_000
"""Records that wait while the client starts or hangs; later ones are dropped. About 50 MB at 64 layers."""
INIT_LIMIT_SECONDS = 60.0
"""After this the server is taken for unreachable and the run is written offline."""
UPLOAD_LIMIT_SECONDS = 20.0
"""The client's own limit for uploading what is left at the end, also when the interpreter exits."""


class Tracker(Protocol):
    """Where records go to be looked at. One rank has one; its methods return at once and raise nothing."""

    def log(self, record: Record) -> None:
        """Take a record; what cannot be taken is dropped."""

    def finish(self, limit_seconds: float = 30.0) -> None:
        """Hand over what is left, for at most `limit_seconds`."""


class NoTracker:
    """`telemetry.wandb: off`."""

    def log(self, record: Record) -> None:
        """Nothing."""

    def finish(self, limit_seconds: float = 30.0) -> None:
        """Nothing."""


def make_tracker(
    config: TelemetryConfig, *, run_dir: Path, run_name: str, resolved_config: Mapping[str, Any]
) -> Tracker:
    """The tracker that `telemetry.wandb` asks for. Call on one rank, after the ranks were forked.

    run_dir: exists; the client writes below run_dir/wandb, and the run's id stands in run_dir/wandb-run-id so that a
    resumed run continues the same W&B run.  resolved_config: the whole RunConfig as JSON values.  Returns at once.
    """
    if config.wandb == "off":
        return NoTracker()
    return WandbTracker(
        mode=config.wandb,
        project=config.wandb_project,
        run_dir=run_dir,
        run_name=run_name,
        resolved_config=resolved_config,
    )


class WandbTracker:
    """The queue, and the thread that empties it. Made by `make_tracker`; the thread runs from construction on."""

    def __init__(
        self,
        *,
        mode: Literal["offline", "online"],
        project: str,
        run_dir: Path,
        run_name: str,
        resolved_config: Mapping[str, Any],
    ) -> None:
        self._mode: Literal["offline", "online"] = mode
        self._project = project
        self._run_dir = run_dir
        self._run_name = run_name
        self._resolved_config = dict(resolved_config)
        self._queue: queue.Queue[Record | None] = queue.Queue(maxsize=QUEUE_RECORDS)
        self._is_off = threading.Event()
        self._has_dropped = False
        # A daemon, so that a client that hangs for ever cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Queue a record; returns at once. A full queue drops it, with one warning per run."""
        if self._is_off.is_set():
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            if not self._has_dropped:
                self._has_dropped = True
                logger.warning("W&B is not keeping up: points are dropped there; metrics.jsonl has them all.")

    def finish(self, limit_seconds: float = 30.0) -> None:
        """Wait for the queue and the client, together at most `limit_seconds`; then leave them behind."""
        deadline = time.monotonic() + limit_seconds
        with suppress(queue.Full):
            self._queue.put(None, timeout=limit_seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._is_off.set()
            logger.warning(
                "W&B did not finish in %g s and was left behind; upload what it wrote with: %s",
                limit_seconds,
                self._sync_command(),
            )

    def _sync_command(self) -> str:
        return f"wandb sync {self._run_dir / 'wandb' / 'offline-run-*'}"

    def _work(self) -> None:
        # The one place that catches everything: what W&B, its service or its server does wrong is not ours to die of.
        try:
            run = self._start()
            while (record := self._queue.get()) is not None:
                run.log(wandb_values(record))
            run.finish()
        except Exception as error:
            if self._is_off.is_set():
                return  # left behind by `finish`, which has said so
            self._is_off.set()
            logger.warning(
                "W&B is off for the rest of this run: %s. metrics.jsonl goes on.", " ".join(str(error).split())
            )

    def _start(self) -> "wandb.Run":
        import wandb

        run_id = read_or_make_run_id(self._run_dir)
        if self._mode == "offline":
            return self._init("offline", run_id)
        try:
            # Without a key `init` would ask for one on the terminal, from a thread, in the middle of the progress bar.
            if not wandb.login(prompt=False):
                raise wandb.errors.UsageError("no API key; set WANDB_API_KEY or run `wandb login`")
            return self._init("online", run_id)
        except wandb.errors.Error as error:
            if self._is_off.is_set():
                raise  # left behind by `finish`: too late to start again
            reason = " ".join(str(error).split())
            logger.warning(
                "W&B cannot be reached (%s): this run is written offline; upload it with: %s",
                reason,
                self._sync_command(),
            )
            return self._init("offline", run_id)

    def _init(self, mode: Literal["offline", "online"], run_id: str) -> "wandb.Run":
        import wandb

        run = wandb.init(
            project=self._project,
            name=self._run_name,
            id=run_id,
            # Offline too: it is how `wandb sync` knows that the files of a resumed run belong together.
            resume="allow",
            dir=self._run_dir,
            mode=mode,
            config=self._resolved_config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                init_timeout=INIT_LIMIT_SECONDS,
                finish_timeout=UPLOAD_LIMIT_SECONDS,
            ),
        )
        # Our own step is the x axis: the client's must never go back, and a resumed run goes back to its checkpoint.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def read_or_make_run_id(run_dir: Path) -> str:
    """The W&B id of the run in this folder; a new one is written down at the first call."""
    path = run_dir / "wandb-run-id"
    if path.exists() and (run_id := path.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def wandb_values(record: Record) -> dict[str, float | int]:
    """The record as W&B charts it: flat names, grouped by what stands before the slash, loads as max over mean."""
    if isinstance(record, EvaluationRecord):
        return {
            "step": record.step,
            "evaluation/loss": record.loss,
            "evaluation/perplexity": record.perplexity,
        }
    if isinstance(record, GuardRecord):
        return {"step": record.step, "guard/loss": record.loss, "guard/grad_norm": record.grad_norm}
    loads = imbalance(record.expert_load)
    values: dict[str, float | int] = {
        "step": record.step,
        "train/loss": record.loss,
        "train/balance_loss": record.balance_loss,
        "train/z_loss": record.z_loss,
        "train/grad_norm": record.grad_norm,
        "train/clip_coefficient": record.clip_coefficient,
        "train/lr": record.lr,
        "train/consumed_samples": record.consumed_samples,
        "train/global_batch": record.global_batch,
        "speed/step_seconds": record.step_seconds,
        "speed/tokens_per_second": record.tokens_per_second,
    }
    if record.mfu is not None:
        values["speed/mfu"] = record.mfu
    if loads:
        values["experts/imbalance_mean"] = sum(loads) / len(loads)
        values["experts/imbalance_worst"] = max(loads)
    return values
