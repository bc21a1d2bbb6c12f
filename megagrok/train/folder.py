"""Taking hold of a run's folder: one run at a time writes there, and what a later command needs lies there.

The one idea: the lock is the kernel's (flock), so whoever dies has let go of it, and nothing is ever to be cleaned up.
"""

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import yaml

from megagrok.config import RunConfig, to_dict
from megagrok.data.prepare import PreparedData
from megagrok.errors import CheckpointError, MachineError
from megagrok.train.files import RunFiles

# Forked ranks hold the lock with their parent, and outlive it by a moment when it is killed.
_PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.05


@contextmanager
def claimed(files: RunFiles) -> Iterator[None]:
    """Hold the run's folder for this process and the ranks it forks. One process of a run calls it.

    Raises CheckpointError that names the process that holds it, and MachineError if it cannot be written: both before
    a step is made that could not be saved.
    """
    try:
        files.checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=files.checkpoints).close()
        lock = files.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"{error.filename or files.checkpoints} cannot be written: {error.strerror}. "
            "Free it, or set runs_dir to a folder that can."
        ) from error
    with lock:
        _take(lock, files)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def write_run_files(run: RunConfig, files: RunFiles, prepared: PreparedData) -> None:
    """Leave in the run's folder what it takes to resume it and to speak with it."""
    header = "# The resolved configuration of this run, written when it was last started.\n"
    whole = files.config.with_name(files.config.name + ".new")
    whole.write_text(header + yaml.safe_dump(to_dict(run), sort_keys=False), encoding="utf-8")
    # In one move, so that a death here leaves the old one to resume from.
    os.replace(whole, files.config)
    if prepared.tokenizer_path is not None:
        shutil.copyfile(prepared.tokenizer_path, files.tokenizer)


def _take(lock: TextIO, files: RunFiles) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                continue
            lock.seek(0)
            raise CheckpointError(
                f"{files.root} is in use by {lock.read().strip() or 'another process'}: two runs in one folder would "
                "overwrite each other. Stop that one, or give this run another name (name=...)."
            ) from error
        except OSError as error:
            raise MachineError(
                f"{files.lock} cannot be locked: {error.strerror}. Set runs_dir to a file system with flock "
                "(Lustre: mount option flock or localflock)."
            ) from error
