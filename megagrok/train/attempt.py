"""What every start of a run leaves behind: attempts/GENERATION/node-K.json, one page per node, kept up to date.

Each node's launcher writes its own page, so no node waits for another and a node that is lost has said what it knew.
Readers need no torch: `megagrok slurm status` and `why` run on a login node. A page is replaced in one move.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagrok.whole_file import write_whole

_FOLDER = "attempts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """A rank as its launcher saw it last."""

    rank: int
    pid: int
    phase: str
    """start, load, step, evaluate or save."""
    step: int
    beats: int
    age_seconds: float
    """Seconds since it was heard, when the page was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the ranks of one node ended."""

    exit_code: int
    at: float
    """Seconds since 1970."""
    host: str
    rank: int | None
    """The rank that was the first to fail or to be late; None if no rank of this node is to blame."""
    phase: str | None
    step: int | None
    error: str | None
    """Class of the error, None after a good end."""
    message: str
    saved_step: int | None
    """Newest step that was saved by then, as far as this node knows."""
    is_node_suspect: bool = False
    """The rank was killed or hung, which a machine may have caused, and did not raise an error of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePage:
    """One node's part of one start of a run."""

    generation: int
    node: int
    num_nodes: int
    host: str
    job: str | None
    """Slurm's job id."""
    restart: int
    """How often Slurm had requeued the job."""
    pid: int
    started_at: float
    at: float
    """When the page was written."""
    ranks: tuple[RankState, ...]
    ending: Ending | None
    slowest_save_seconds: float | None = None
    """Of this start, from the first copy to the commit; None while there was no save."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run, over all nodes that have written a page."""

    generation: int
    nodes: tuple[NodePage, ...]

    @property
    def folder_name(self) -> str:
        """Its folder below attempts/."""
        return f"{self.generation:05d}"

    @property
    def ending(self) -> Ending | None:
        """The ending that explains the others: of a failure the one that names a rank and came first; a lost peer is
        an echo. None while no node has ended."""
        endings = [page.ending for page in self.nodes if page.ending is not None]
        if not endings:
            return None
        return min(endings, key=lambda ending: (ending.exit_code in (0, 76), ending.rank is None, ending.at))

    @property
    def saved_step(self) -> int | None:
        """Newest step that any node knew to be saved."""
        saved = [page.ending.saved_step for page in self.nodes if page.ending is not None]
        return max((step for step in saved if step is not None), default=None)

    @property
    def slowest_save_seconds(self) -> float | None:
        """Of all that any node knew of."""
        return max((page.slowest_save_seconds for page in self.nodes if page.slowest_save_seconds), default=None)

    @property
    def furthest_step(self) -> int:
        """The step that some rank was working on when the attempt was last heard."""
        return max((rank.step for page in self.nodes for rank in page.ranks), default=0)


def attempt_folder(root: Path, generation: int) -> Path:
    """Folder of one start of the run in the folder `root`."""
    return root / _FOLDER / f"{generation:05d}"


def write_page(root: Path, page: NodePage) -> None:
    """Put a node's page in place in one move. Raises OSError."""
    folder = attempt_folder(root, page.generation)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"node-{page.node:03d}.json", json.dumps(asdict(page)))


def generations(root: Path) -> list[int]:
    """Numbers of the starts that the folder `root` knows of, ascending. Reads no page."""
    return sorted(int(path.name) for path in (root / _FOLDER).glob("[0-9]*") if path.name.isdecimal())


def read_attempts(root: Path, *, after: int = 0) -> list[Attempt]:
    """Every start of the run in the folder `root` with a generation above `after`, oldest first. Pages that cannot be
    read are left out: they tell a person what happened, and decide nothing about the run's state."""
    attempts = []
    for generation in generations(root):
        if generation > after:
            paths = sorted(attempt_folder(root, generation).glob("node-*.json"))
            attempts.append(
                Attempt(generation, tuple(page for path in paths if (page := _read_page(path)) is not None))
            )
    return attempts


def _read_page(path: Path) -> NodePage | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ranks: Sequence[dict[str, Any]] = value["ranks"]
        ending: dict[str, Any] | None = value["ending"]
        page = NodePage(**{**value, "ranks": (), "ending": None})
        return replace(
            page,
            ranks=tuple(RankState(**rank) for rank in ranks),
            ending=None if ending is None else Ending(**ending),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
