"""One `megagrok` command in a forked process that is watched: what it writes where, whether ranks meet, how long it
takes.

`run_here` forks this process, and shares whatever it has imported. `LoginNode` is another process that has imported the
command line and nothing else, as on a login node without torch, and forks there. So imports are not in the seconds, and
everything that one command does is. The watch is Python's own audit hook, which no code of the command can take off; it
also sees what children that it forks do.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megagrok.cli import main

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "megatron", "deepspeed", "transformers", "datasets", "wandb")
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
HARMLESS = ("/dev/null", "/dev/tty", "/proc/")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended and what it did on the way."""

    status: int
    out: str
    err: str
    seconds: float
    outside: tuple[str, ...]
    """Paths outside its folder that it wrote, made or removed."""
    met: bool
    """Whether it, or a process below it, made a process group."""
    heavy: tuple[str, ...]
    """Libraries of HEAVY that it ended with."""


def run_here(arguments: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a command in a fork of this process, called in `folder`. environment: variables besides this process's."""
    notes = folder.parent / f".{folder.name}-notes"
    notes.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _live([str(argument) for argument in arguments], folder, environment or {}, notes)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - start
    texts = {name: _taken(notes / name) for name in ("out", "err", "outside", "met", "heavy")}
    notes.rmdir()
    return Outcome(
        status=os.waitstatus_to_exitcode(status),
        out=texts["out"],
        err=texts["err"],
        seconds=seconds,
        outside=tuple(texts["outside"].splitlines()),
        met=bool(texts["met"]),
        heavy=tuple(texts["heavy"].split()),
    )


class LoginNode:
    """A process with the command line and no torch. Use as a context manager."""

    def __enter__(self) -> "LoginNode":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, arguments: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> Outcome:
        """As `run_here`, over there."""
        request = {"arguments": [*map(str, arguments)], "folder": str(folder), "environment": dict(environment or {})}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return Outcome(**{**answer, "outside": tuple(answer["outside"]), "heavy": tuple(answer["heavy"])})


def _live(arguments: list[str], folder: Path, environment: Mapping[str, str], notes: Path) -> None:
    status = 99
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.dont_write_bytecode = True
        tempfile.tempdir = None  # asked again, now that TMPDIR may be another
        for number, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        _watch(folder, notes)
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _note(notes / "heavy", " ".join(name for name in HEAVY if name in sys.modules))
        os._exit(status)


def _watch(folder: Path, notes: Path) -> None:
    allowed = (os.path.realpath(folder), os.path.realpath(notes), *HARMLESS)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            flags = arguments[2]
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in WRITES:
            return
        for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            # A descriptor is of a file that was opened before, and seen then.
            if isinstance(path, str | bytes | os.PathLike):
                text = os.fspath(path) if not isinstance(path, bytes) else path.decode()
                # A link that is opened leads elsewhere; one that is renamed or removed is itself what goes.
                parent, name = os.path.split(text)
                real = os.path.realpath(text) if event == "open" else os.path.join(os.path.realpath(parent), name)
                if not real.startswith(allowed):
                    _note(notes / "outside", f"{event} {real}\n")

    sys.addaudithook(hook)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None:
        begin = distributed.init_process_group

        def init_process_group(*positional: object, **named: object) -> object:
            _note(notes / "met", "yes")
            return begin(*positional, **named)

        distributed.init_process_group = init_process_group  # type: ignore[attr-defined]


def _note(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def _taken(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


def serve() -> None:
    """Answer requests, one a line, until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        outcome = run_here(request["arguments"], Path(request["folder"]), request["environment"])
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    serve()
