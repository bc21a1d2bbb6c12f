"""Folders that are built once and shared: complete or not there.

Not a cache with eviction: entries stay until somebody deletes them. The one idea: an entry is a folder whose name is a
hash of all that decides its content, built aside and moved into place by one rename. So an entry that exists is
complete, and of two processes that race one wins and both can read. A killed build leaves a folder `.building-...`
behind, which nothing reads and anybody may delete.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from megagrok.data.tokens import sync_folder
from megagrok.errors import DataError, MachineError

MARKER = "prepared.json"


def cached_entry(
    cache: Path, kind: str, description: dict[str, object], build: Callable[[Path], dict[str, object]]
) -> Path:
    """The folder of the entry that `description` names, built if it is not there yet.

    build: fills an empty folder and returns what its marker should say besides the description. Raises DataError if
    the entry is damaged, MachineError if the cache cannot be written, and whatever build raises.
    """
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / f"{kind}-{key}"
    if folder.is_dir():
        _check_entry(folder)
        return folder
    aside = cache / f".building-{key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise MachineError(f"data.cache = {cache}: cannot be written ({error.strerror})") from error
    try:
        facts = build(aside)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        marker = {"description": description, "sizes": sizes, **facts}
        with (aside / MARKER).open("w", encoding="utf-8") as file:
            json.dump(marker, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside)
        _move_into_place(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"data.cache = {cache}: no space left. Free some, or use another folder.") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _check_entry(folder)
    return folder


def _move_into_place(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError as error:
        # Another process finished the same entry first; its content is equal, so ours is not needed.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return
    sync_folder(folder.parent)


def _check_entry(folder: Path) -> None:
    """Raise DataError unless every file of a cache entry has the size it was written with."""
    sizes = read_marker(folder)["sizes"]
    assert isinstance(sizes, dict)
    for name, size in sizes.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            seen = "is missing" if actual is None else f"has {actual:,} bytes"
            raise DataError(f"{path} {seen}, was written with {size:,}. Delete the folder {folder} to build it again.")


def read_marker(folder: Path) -> dict[str, object]:
    """What is known about an entry: its description, the sizes of its files, and what its build returned."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: incomplete or damaged cache entry ({error}). Delete the folder.") from error
    if not isinstance(marker, dict) or not isinstance(marker.get("sizes"), dict):
        raise DataError(f"{folder / MARKER}: not a marker of a cache entry. Delete the folder.")
    return marker
