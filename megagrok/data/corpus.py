"""Documents of a source: the text every CPython has, or files of text, JSON lines or parquet.

Not a filter: a document comes out as it stands, and what cannot be a document is refused with its place. The one idea:
a source is a deterministic list of files, so that the same source gives the same documents in the same order.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from megagrok.config.schema import SourceConfig
from megagrok.data import readers
from megagrok.data.readers import Document
from megagrok.errors import DataError

# Tests and foreign packages are no part of the library; charmap tables are near-copies of each other, which would
# put the same text on both sides of the held-out split; the topics are read as prose below; the last is made by the
# build of this interpreter and names its machine.
_LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
_LEFT_OUT_PREFIX = "_sysconfigdata"

_ENDINGS = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A configured source with its files found. `setting` names it in messages: data.sources[0]."""

    config: SourceConfig
    setting: str
    files: tuple[Path, ...]

    def describe(self) -> dict[str, object]:
        """What decides the documents, as JSON: kind, limits, and each file with its size and time of change."""
        files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]
        interpreter = platform.python_version() if self.config.kind == "python_stdlib" else None
        return {
            "kind": self.config.kind,
            "text_field": self.config.text_field if self.config.kind in ("jsonl", "parquet") else None,
            "max_bytes": self.config.max_bytes,
            "python": interpreter,
            "files": files,
        }


def find_sources(configs: tuple[SourceConfig, ...]) -> tuple[Source, ...]:
    """The sources with their files. Raises DataError naming every path that leads nowhere or is read twice."""
    found: list[Source] = []
    problems: list[str] = []
    owner: dict[Path, str] = {}
    for number, config in enumerate(configs):
        setting = f"data.sources[{number}]"
        try:
            files = _find_files(config, setting)
        except DataError as error:
            problems.append(str(error))
            continue
        for path in files:
            first = owner.setdefault(path.resolve(), setting)
            if first != setting:
                problems.append(f"{setting}: {path} is already read by {first}")
                break
        found.append(Source(config, setting, files))
    if problems:
        raise DataError("\n".join(problems))
    return tuple(found)


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source in a fixed order, blank ones left out, up to the source's max_bytes.

    The document that reaches max_bytes is the last one. python_stdlib is ordered by a hash of each document's name, so
    that any max_bytes takes an even spread of it, prose included. Raises DataError with the place of a bad document,
    and if there is no document at all.
    """
    num_bytes = num_documents = 0
    for document in _read(source):
        size = len(document.text.encode("utf-8", errors="surrogatepass"))
        _check_text(document)
        if not document.text.strip():
            continue
        yield document
        num_documents += 1
        num_bytes += size
        if source.config.max_bytes is not None and num_bytes >= source.config.max_bytes:
            return
    if num_documents == 0:
        where = ", ".join(str(path) for path in source.files[:3]) or source.config.kind
        raise DataError(f"{source.setting}: {where}: no documents, only blank ones or none at all")


def _read(source: Source) -> Iterator[Document]:
    match source.config.kind:
        case "python_stdlib":
            return _read_stdlib(source.files)
        case "text":
            return readers.read_text_files(source.files)
        case "jsonl":
            return readers.read_jsonl_files(source.files, source.config.text_field)
        case "parquet":
            return readers.read_parquet_files(source.files, source.config.text_field)


def _check_text(document: Document) -> None:
    at = document.text.find("\0")
    if at >= 0:
        raise DataError(f"{document.place}: NUL at character {at:,}; text has none, binary files do")
    if not document.text.isascii():
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{document.place}: lone surrogate U+{ord(document.text[error.start]):04X} at character "
                f"{error.start:,}; it has no UTF-8 form"
            ) from error


def _find_files(config: SourceConfig, setting: str) -> tuple[Path, ...]:
    if config.kind == "python_stdlib":
        if config.path is not None:
            raise DataError(f"{setting}.path = {config.path}: python_stdlib takes no path")
        return _stdlib_files()
    if not config.path:
        raise DataError(f"{setting}.path is not given; kind {config.kind} needs a file, a folder or a glob")
    path = Path(config.path)
    if path.is_file():
        return (path,)
    if path.is_dir():
        endings = _ENDINGS[config.kind]
        files = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and file.is_file())
        if not files:
            raise DataError(
                f"{setting}.path = {config.path}: the folder holds no {' or '.join(endings)} file. "
                f"Name others by a glob, such as {path / '**' / '*.rst'}"
            )
        return tuple(files)
    if not glob.has_magic(config.path):
        raise DataError(f"{setting}.path = {config.path}: no such file or folder")
    matches = sorted(Path(match) for match in glob.glob(config.path, recursive=True) if Path(match).is_file())
    if not matches:
        raise DataError(f"{setting}.path = {config.path} matches no file")
    return tuple(matches)


def _stdlib_files() -> tuple[Path, ...]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(_stdlib_root()):
        # Pruned in place, or the walk would go through every installed package.
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT_FOLDERS]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_LEFT_OUT_PREFIX)
        ]
    return tuple(sorted(found))


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read_stdlib(files: tuple[Path, ...]) -> Iterator[Document]:
    root = _stdlib_root()
    names: dict[str, Path | None] = {path.relative_to(root).as_posix(): path for path in files}
    names |= {f"pydoc_data.topics/{topic}": None for topic in topics.topics}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        path = names[name]
        if path is None:
            yield Document(topics.topics[name.removeprefix("pydoc_data.topics/")], name)
        else:
            yield Document(path.read_bytes().decode("utf-8").replace("\r\n", "\n"), name)
