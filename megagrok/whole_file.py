"""A small file put in place whole: whoever reads it sees the old one or the new one, and a death leaves the old one.

Below every room: pages, settings and reports are all written this way. Shards and commits are not; see checkpoint/disk.
"""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Write `content`, text as UTF-8, beside `path` and rename it over. Processes that write the same path at once
    leave one of their contents. sync: wait until the bytes are on the medium.  Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    # A link of that name, whoever put it there, is not followed.
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
