"""A training command whose steps are spoilt on purpose, through the seam that drills use; and the run it should equal,
made without trainer, guard or ledger: only engine, data and the schedule."""

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from layouts import copies, whole
from ranks import run_ranks

from megagrok.checkpoint import Fragment
from megagrok.config import RunConfig, decode_config
from megagrok.data.batches import TrainBatches
from megagrok.data.prepare import PreparedData, prepare
from megagrok.engine.engine import Engine, build_engine
from megagrok.errors import MegagrokError
from megagrok.parallel.groups import make_groups
from megagrok.parallel.ranks import Ranks
from megagrok.parallel.topology import Topology
from megagrok.plan import global_batch_at, world_size
from megagrok.platform import CPU
from megagrok.train.beginning import Request
from megagrok.train.files import RunFiles
from megagrok.train.schedule import learning_rate
from megagrok.train.start import start_training
from tests.train.commands import Command, Done

Inject = Callable[[int, Engine], None]
EXPERTS = ("parallel.data=2", "parallel.expert=2")
SPIKES = ("guard.on_spike=rewind", "guard.window_steps=8", "checkpoint.every_steps=3")


class Injected(Command):
    """`megagrok train` with something done to its steps."""

    def __init__(self, inject: Inject, config: Path, *settings: str, folder: Path) -> None:
        self._inject = inject
        super().__init__(config, *settings, folder=folder)

    def main(self, arguments: list[str]) -> int:
        """As the command does, which has no option for this."""
        config, *settings = arguments
        loaded = decode_config(Path(config), settings)
        try:
            start_training(loaded.config, RunFiles.of(loaded.config), Request(inject=self._inject))
        except MegagrokError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        return 0


def train_injected(inject: Inject, config: Path, *settings: str, folder: Path, status: int = 0) -> Done:
    """Such a command from its begin to its end, which has to be `status`."""
    done = Injected(inject, config, *settings, folder=folder).wait()
    assert done.status == status, f"exit status {done.status}, {status} was expected\n{done.out}\n{done.err}"
    return done


def spoil(engine: Engine, value: float) -> None:
    """Put `value` into one element of the last expert's accumulated gradient on this rank."""
    item = [item for item in engine.local_parameters if item.is_expert][-1]
    engine._gradient_of(item.parameter).view(-1)[-1] = value


def spike_once(step_of_spike: int, then: Inject | None = None) -> Inject:
    """A gradient a thousand times too large, the first time that a step comes; `then` when it comes again."""
    came: list[int] = []

    def inject(step: int, engine: Engine) -> None:
        if step == step_of_spike and not came:
            came.append(step)
            for item in engine.local_parameters:
                engine._gradient_of(item.parameter).mul_(1000.0)
        elif step == step_of_spike and then is not None:
            then(step, engine)

    return inject


def train_plainly(
    config: Path,
    *settings: str,
    skipped: Collection[int] = (),
    left_out: Sequence[tuple[int, int]] = (),
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Losses by step and the state after the last one, of a run that makes no update in the `skipped` steps and never
    had the samples `left_out`."""
    run = decode_config(config, settings).config
    prepared = prepare(run.data, model_vocab_size=run.model.vocab_size)
    results = run_ranks(
        _train_plainly,
        world_size(run.parallel),
        run=run,
        prepared=prepared,
        skipped=tuple(skipped),
        left_out=tuple(left_out),
    )
    return results[0][0], whole(fragments for _, fragments in results)


def _train_plainly(
    ranks: Ranks,
    run: RunConfig,
    prepared: PreparedData,
    skipped: tuple[int, ...],
    left_out: tuple[tuple[int, int], ...],
) -> tuple[dict[int, float], list[Fragment]]:
    groups = make_groups(
        Topology.of(run.parallel),
        virtual_pipeline=run.parallel.virtual_pipeline,
        platform=CPU,
        timeout_seconds=60.0,
    )
    engine = build_engine(run, groups, CPU)
    data = TrainBatches.of(run, prepared, groups.coordinates.data)
    data.leave_out(left_out)
    losses = {}
    for step in range(1, run.train.steps + 1):
        batch = data.next_batch(global_batch_at(run.train, data.next_sample))
        if step in skipped:
            continue
        totals = engine.forward_backward(batch)
        losses[step] = totals.ce_sum / totals.num_tokens
        lr = learning_rate(step, peak=run.optimizer.lr, schedule=run.schedule, total_steps=run.train.steps)
        assert engine.update(lr).is_applied
    return losses, copies(engine.state_fragments())
