"""What several ranks hold alike, bit by bit, and the proof that they do: 64-bit hashes, compared over the ranks.

Finds a weight that one machine has silently changed. The one idea: ranks that hold the same tensor compute the same
update from the same reduced gradient, so one different bit is a fault and never noise.

    kind       tensors                                                    ranks that hold the same
    split      weights that the tensor ranks share out                    data x context
    whole      norms, routers; the routers' loads of the step before      data x context x tensor
    expert     experts                                                    expert-data

Not seen: optimizer shards under ZeRO, of which there is one copy. Under ZeRO each update also overwrites the weights
from those shards, so a changed weight lives for one step; without it, until it is found.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash
from torch import Tensor, uint8

from megagrok.engine.optimizer import Shard
from megagrok.errors import ReplicaError
from megagrok.model.grok import GrokModel
from megagrok.model.parts import LocalParameter
from megagrok.parallel.groups import ProcessGroups
from megagrok.parallel.ranks import JSON, Ranks
from megagrok.parallel.topology import Topology

Kind = Literal["split", "whole", "expert"]
KINDS: tuple[Kind, ...] = ("split", "whole", "expert")


@dataclass(frozen=True, slots=True)
class Replica:
    """One tensor of which other ranks hold a copy."""

    kind: Kind
    name: str
    """Its global name; a block of it where the layout splits it."""
    values: Tensor
    """Flat, on the device, a view."""


def replicated(
    parameters: Sequence[LocalParameter],
    chunks: Sequence[GrokModel],
    held_whole: Sequence[Shard],
    groups: ProcessGroups,
) -> Iterator[Replica]:
    """The copies on this rank. held_whole: optimizer shards that every replica keeps. Local."""
    for item in parameters:
        flat = item.parameter.detach().view(-1)
        for part in item.parts:
            place = f" from {part.start}" if any(part.start) else ""
            yield Replica(_kind(item), part.name + place, flat[part.offset : part.offset + part.size])
    for shard in held_whole:
        for moment, values in shard.moments.items():
            yield Replica(_kind(shard.owner), f"{moment}/{shard.owner.parts[0].name}", values)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            yield Replica("whole", f"router_load/{layer.layer_number - 1}", layer.mlp.router.load_E.view(-1))


def check_replicas(replicas: Iterable[Replica], topology: Topology, ranks: Ranks, *, step: int) -> None:
    """Compare this rank's copies with everyone's. Collective: a gather of three numbers; of all hashes on a mismatch.

    Copies go through host memory one tensor at a time. Raises ReplicaError on all ranks, naming tensors and ranks.
    """
    hashes: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for replica in replicas:
        data = replica.values.contiguous().view(uint8).cpu().numpy()
        hashes[replica.kind][replica.name] = xxhash.xxh3_64_intdigest(data.data)
    mine: dict[str, JSON] = {
        kind: xxhash.xxh3_64_hexdigest(repr(sorted(hashes[kind].items())).encode()) for kind in KINDS
    }
    theirs = ranks.gather(mine)
    if all(
        _agree(group, [_of(other, kind) for other in theirs]) for kind in KINDS for group in _groups(kind, topology)
    ):
        return
    shown: dict[str, JSON] = {kind: {name: f"{value:016x}" for name, value in hashes[kind].items()} for kind in KINDS}
    everyone = ranks.gather(shown)
    found = [
        line
        for kind in KINDS
        for group in _groups(kind, topology)
        for line in _differences(group, [_of(other, kind) for other in everyone])
    ]
    raise ReplicaError(
        f"copies of the same tensor differ at step {step}: {'; '.join(found[:4])}"
        + (f"; and {len(found) - 4} more" if found[4:] else "")
        + ". A machine has changed bits in memory or computed wrongly; nothing is saved. Restart from the newest "
        "checkpoint, without the node of the rank that is named."
    )


def _agree(group: Sequence[int], digests: Sequence[object]) -> bool:
    return len({str(digests[rank]) for rank in group}) == 1


def _differences(group: Sequence[int], hashes: Sequence[object]) -> Iterator[str]:
    """For each tensor of a group's copies that differ: which ranks stand alone against the majority."""
    by_name: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank in group:
        named = hashes[rank]
        assert isinstance(named, dict)
        for name, value in named.items():
            by_name[name][str(value)].append(rank)
    for name, ranks_by_hash in by_name.items():
        if len(ranks_by_hash) > 1:
            yield f"{name} on {_blamed(ranks_by_hash)}"


def _blamed(ranks_by_hash: dict[str, list[int]]) -> str:
    sizes = Counter({value: len(held) for value, held in ranks_by_hash.items()})
    (common, most), (_, second) = sizes.most_common(2)
    if most == second:
        return (
            f"ranks {', '.join(str(held) for held in sorted(ranks_by_hash.values()))} (no majority says which is right)"
        )
    odd = sorted(rank for value, held in ranks_by_hash.items() if value != common for rank in held)
    named = f"rank {odd[0]}" if len(odd) == 1 else f"ranks {odd}"
    return f"{named} ({most} other ranks agree)"


def _kind(item: LocalParameter) -> Kind:
    if item.is_expert:
        return "expert"
    return "whole" if item.is_replicated_over_tensor else "split"


def _groups(kind: Kind, topology: Topology) -> list[list[int]]:
    match kind:
        case "split":
            return topology.groups("data", "context")
        case "whole":
            return topology.groups("data", "context", "tensor")
        case "expert":
            return topology.expert_data_groups()


def _of(gathered: object, kind: Kind) -> object:
    assert isinstance(gathered, dict)
    return gathered[kind]
