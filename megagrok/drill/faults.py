"""The faults, each a function that takes a run from its first step to its last and hurts it on the way.

What is hit, and when, comes from the scene's random numbers: one seed repeats a drill up to the machine's own timing.
"""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megagrok.checkpoint.commit import step_name
from megagrok.drill.life import Life
from megagrok.drill.oracle import newest_saved
from megagrok.drill.scene import DIED, STOPPED, Round, Scene
from megagrok.drill.subject import NUM_RANKS, SAVE_EVERY_STEPS
from megagrok.engine.engine import Engine
from megagrok.errors import CheckpointError, MachineError
from megagrok.train.attempt import read_attempts

_STARTUP_SHARE = 0.15
_STARTUP_SECONDS = 2.0
_GRACE_SECONDS = 10.0


def kill(scene: Scene, rounds: int) -> None:
    """SIGKILL to a rank or the launcher, at any time: in a step, a save, a barrier, while starting."""
    life = scene.live()
    for _ in range(rounds):
        in_startup = scene.random.random() < _STARTUP_SHARE
        if in_startup:
            time.sleep(scene.random.random() * _STARTUP_SECONDS)
            if not life.is_running():
                break
        else:
            begun = newest_saved(scene.files)
            if not scene.is_at(life, begun + scene.random.randint(1, 2 * SAVE_EVERY_STEPS)):
                break
            time.sleep(scene.random.random() * scene.step_seconds)
        saved, step = newest_saved(scene.files), scene.last_step()
        victims = [life.pid, *life.children()]
        index = scene.random.randrange(len(victims))
        at = time.monotonic()
        if not life.is_running():
            break
        _signal(victims[index], signal.SIGKILL)
        who = "the launcher" if index == 0 else f"child {index} of {len(victims) - 1}"
        what = f"{who}, {'starting' if in_startup else f'after step {step}'}"

        def has_ranks(life: Life = life) -> bool:
            return len(life.children()) == NUM_RANKS

        was_rank = index > 0 and len(victims) - 1 == NUM_RANKS
        if index and not was_rank and not life.ends_before(has_ranks, _GRACE_SECONDS):
            # No rank: it prepared the data ahead of the launcher, which then does so itself.
            scene.rounds.append(Round(fault="kill", what=f"{what}: not needed"))
            continue
        scene.hit(life, "kill", what, at, saved, (*DIED, 0))
        life = scene.recover(at) if not in_startup else scene.live()
    scene.finish(life)


def hang(scene: Scene, rounds: int) -> None:
    """SIGSTOP to a rank. Its launcher has to name it, with the stacks of all, and end the start."""
    life = scene.live()
    for _ in range(rounds):
        if not scene.is_at(life, scene.last_step() + scene.random.randint(2, SAVE_EVERY_STEPS)):
            break
        saved, pids = newest_saved(scene.files), life.children()
        victim = scene.random.randrange(len(pids))
        at = time.monotonic()
        _signal(pids[victim], signal.SIGSTOP)
        scene.hit(life, "hang", f"rank {victim}, after step {scene.last_step()}", at, saved, DIED[:1])
        ending = read_attempts(scene.files.root)[-1].ending
        if ending is None or ending.rank != victim:
            scene.problems.append(f"O5: rank {victim} hung, {'nobody' if ending is None else ending.rank} was named")
        if life.said.count("in train_rank") < len(pids):
            scene.problems.append("O5: not every rank's stack is in the log")
        life = scene.recover(at)
    scene.finish(life)


def slow(scene: Scene, rounds: int) -> None:
    """One rank gets a third of its time. It has to be named, no other, and nothing else happens; once in a run,
    whatever `rounds` says, for a rank is named once."""
    life = scene.live()
    scene.is_at(life, 4)
    pids = life.children()
    victim = scene.random.randrange(len(pids))
    at, begun = time.monotonic(), scene.last_step()
    while life.is_running() and "is slow" not in life.said and scene.last_step() < scene.run.train.steps - 1:
        _signal(pids[victim], signal.SIGSTOP)
        time.sleep(0.1)
        _signal(pids[victim], signal.SIGCONT)
        time.sleep(0.05)
    named, step = time.monotonic() - at, scene.last_step()
    scene.finish(life)
    found = [line for line in life.said.splitlines() if "is slow" in line]
    problems = []
    if len(found) != 1 or not found[0].startswith(f"rank {victim} "):
        problems.append(f"O5: rank {victim} was slow, and this was said: {found}")
    scene.rounds.append(
        Round(
            fault="slow",
            what=f"rank {victim}, named after {step - begun} steps",
            recovery_seconds=named,
            problems=tuple(problems),
        )
    )


def preempt(scene: Scene, rounds: int) -> None:
    """SIGTERM or SIGUSR1, twice in a row. The step is finished and saved once, whatever was going on."""
    life = scene.live()
    for _ in range(rounds):
        if not scene.is_at(life, scene.last_step() + scene.random.randint(1, SAVE_EVERY_STEPS)):
            break
        time.sleep(scene.random.random() * scene.step_seconds)
        number = scene.random.choice((signal.SIGTERM, signal.SIGUSR1))
        saved, step, at = newest_saved(scene.files), scene.last_step(), time.monotonic()
        _signal(life.pid, number)
        time.sleep(0.05)
        _signal(life.pid, signal.SIGTERM)
        scene.hit(life, "preempt", f"{number.name} and SIGTERM, after step {step}", at, saved, (*STOPPED, 0))
        if newest_saved(scene.files) != scene.last_step():
            scene.problems.append(
                f"O4: step {scene.last_step()} was done, step {newest_saved(scene.files)} is the newest that was saved"
            )
        if not step <= scene.last_step() <= step + 2:
            scene.problems.append(f"O5: stopped after step {scene.last_step()}, asked in step {step + 1}")
        life = scene.recover(at)
    scene.finish(life)


def node_loss(scene: Scene, rounds: int) -> None:
    """SIGKILL to the launcher and all its ranks at once, as a node that loses its power."""
    life = scene.live()
    for _ in range(rounds):
        if not scene.is_at(life, newest_saved(scene.files) + scene.random.randint(1, 2 * SAVE_EVERY_STEPS)):
            break
        time.sleep(scene.random.random() * scene.step_seconds)
        saved, step, at = newest_saved(scene.files), scene.last_step(), time.monotonic()
        life.end()
        scene.hit(life, "node-loss", f"everything, after step {step}", at, saved, (-9,))
        life = scene.recover(at)
    scene.finish(life)


def corrupt(scene: Scene, rounds: int) -> None:
    """The newest checkpoint rots: a bit turns, a page is lost, a file is cut or gone. The one before it is taken; if
    all are rotten the run stops with status 4 and starts nothing over."""
    life = scene.live()
    for _ in range(rounds):
        if not scene.is_at(life, newest_saved(scene.files) + 2 * SAVE_EVERY_STEPS + 1):
            break
        life.end()
        scene.end_of(life)
        at = time.monotonic()
        newest = scene.files.checkpoints / step_name(newest_saved(scene.files))
        how = _rot(newest, scene)
        life = scene.live()
        scene.is_at(life, scene.last_step() + 1)
        problems = []
        if f"passed over {newest.name}" not in life.said:
            problems.append(f"O5: {newest.name} is rotten ({how}) and was not passed over:\n{life.said[-1500:]}")
        scene.rounds.append(
            Round(
                fault="corrupt",
                what=f"{newest.name}: {how}",
                recovery_seconds=time.monotonic() - at,
                steps_redone=SAVE_EVERY_STEPS,
                problems=tuple(problems),
            )
        )
    scene.is_at(life, scene.last_step() + SAVE_EVERY_STEPS + 1)
    life.end()
    scene.end_of(life)
    _all_rotten(scene)
    scene.finish(scene.live())


def disk_full(scene: Scene, rounds: int) -> None:
    """The checkpoints' disk fills up at a random place of a save. Training goes on, what was saved stays, and the next
    save after there is room again succeeds. Needs root, for a small file system of its own."""
    _mount_small_disk(scene.files.checkpoints)
    life = scene.live()
    try:
        filler = scene.files.checkpoints / "filler"
        for _ in range(rounds):
            if not scene.is_at(life, newest_saved(scene.files) + 1):
                break
            saved, at = newest_saved(scene.files), time.monotonic()
            left = scene.random.randrange(1, _bytes_of_a_save(scene))
            _fill(filler, left)
            is_said = life.until(lambda: "was not saved" in life.said or "not saved" in life.said)
            step = scene.last_step()
            filler.unlink()
            is_saved = life.until(lambda saved=saved: newest_saved(scene.files) > saved)  # type: ignore[misc]
            problems = []
            if not is_said or not is_saved:
                problems.append(f"O5: said: {is_said}, saved again: {is_saved}:\n{life.said[-1500:]}")
            scene.rounds.append(
                Round(
                    fault="disk-full",
                    what=f"{left:,} bytes left, by step {step}",
                    recovery_seconds=time.monotonic() - at,
                    problems=tuple(problems),
                )
            )
        scene.finish(life)
    finally:
        life.end()
        # The proof reads the checkpoints: they are copied off before their disk goes.
        copied = scene.files.root / "checkpoints.kept"
        shutil.copytree(scene.files.checkpoints, copied)
        subprocess.run(["umount", "-l", str(scene.files.checkpoints)], check=True)
        scene.files.checkpoints.rmdir()
        copied.rename(scene.files.checkpoints)


def nan(scene: Scene, rounds: int) -> None:
    """A gradient on one rank is not a number. All ranks leave the step out together, and write down what it was."""
    steps = sorted(scene.random.sample(range(3, scene.run.train.steps - 1, 3), rounds))
    victims = {step: scene.random.randrange(2) for step in steps}

    def poison(step: int, engine: Engine) -> None:
        if step in victims and torch.distributed.get_rank() == victims[step]:
            gradient = engine.local_parameters[0].parameter.grad
            assert gradient is not None
            gradient.view(-1)[0] = float("nan")

    scene.run = replace(scene.run, guard=replace(scene.run.guard, on_nonfinite="skip"))
    scene.inject = poison
    scene.finish(scene.live())
    for step, victim in victims.items():
        path = scene.files.bad_step(step)
        problems = [] if path.exists() else [f"O5: {path.name} was not written"]
        what = f"rank {victim}, step {step}"
        scene.rounds.append(
            Round(
                fault="nan",
                what=what,
                problems=tuple(problems),
            )
        )


Fault = Callable[[Scene, int], None]
FAULTS: dict[str, Fault] = {
    "kill": kill,
    "hang": hang,
    "slow": slow,
    "preempt": preempt,
    "node-loss": node_loss,
    "corrupt": corrupt,
    "disk-full": disk_full,
    "nan": nan,
}


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _rot(folder: Path, scene: Scene) -> str:
    """Spoil one file of a checkpoint; returns how."""
    path = scene.random.choice(sorted(folder.iterdir()))
    how = scene.random.choice(("bit", "hole", "cut", "gone"))
    content = bytearray(path.read_bytes())
    place = scene.random.randrange(len(content))
    match how:
        case "bit":
            content[place] ^= 1 << scene.random.randrange(8)
        case "hole":
            hole = bytes(min(4096, len(content) - place))
            # Zeros over zeros are no damage.
            content[place : place + len(hole)] = hole if any(content[place : place + len(hole)]) else b"\1" * len(hole)
        case "cut":
            del content[place:]
        case "gone":
            path.unlink()
            return f"{path.name} is gone"
    path.write_bytes(content)
    return f"{path.name}: {how} at byte {place}"


def _all_rotten(scene: Scene) -> None:
    """Every checkpoint is spoilt, and mended again after the run has refused to start."""
    kept = scene.files.root / "kept"
    shutil.copytree(scene.files.checkpoints, kept)
    for folder in scene.files.checkpoints.glob("step-*"):
        _rot(folder, scene)
    at = time.monotonic()
    life: Life = scene.live()
    saved = newest_saved(scene.files)
    scene.hit(life, "corrupt", "all checkpoints", at, min(saved, 0), (CheckpointError.exit_code,))
    shutil.rmtree(scene.files.checkpoints)
    kept.rename(scene.files.checkpoints)


def _fill(path: Path, left: int) -> None:
    """Leave `left` bytes of the disk of `path`, while a save may be taking and giving back some."""
    with path.open("wb") as stream:
        while True:
            free = shutil.disk_usage(path.parent).free
            try:
                os.posix_fallocate(stream.fileno(), 0, max(1, free - left))
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _bytes_of_a_save(scene: Scene) -> int:
    """Roughly; a megabyte if there is none to ask, or it has just been pruned."""
    newest = scene.files.checkpoints / step_name(newest_saved(scene.files))
    try:
        return sum(path.stat().st_size for path in newest.iterdir())
    except FileNotFoundError:
        return 1 << 20


def _mount_small_disk(folder: Path) -> None:
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MachineError(
            f"disk-full needs a small file system of its own: {done.stderr.strip()}. Run it as root, or leave it out."
        )
