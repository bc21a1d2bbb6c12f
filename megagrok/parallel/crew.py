"""The launchers of several nodes, talking before there are ranks and after: a `Ranks` over a store that node 0 holds.

The ranks meet through the same store. It listens on the one address that the nodes were given, on no other interface.
The one idea: every wait polls, so a signal ends a launcher that waits for a node that never came.
"""

import fcntl
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

from megagrok.errors import MachineError, RankError
from megagrok.parallel.placement import Nodes
from megagrok.parallel.ranks import JSON, Alone, Ranks

_POLL_SECONDS = 0.05
_LEAVE_SECONDS = 5.0
_SIOCGIFADDR = 0x8915


class Crew:
    """Launcher `nodes.index` of `nodes.count`. `gather`, `barrier` and `any` are collective over the launchers."""

    def __init__(self, nodes: Nodes, store: Store, timeout_seconds: float) -> None:
        self.rank, self.world_size = nodes.index, nodes.count
        self._store, self._timeout_seconds = PrefixStore("launchers", store), timeout_seconds
        self._round = 0

    def gather(self, value: JSON) -> list[JSON]:
        """Everyone's value, in the order of the nodes. Raises RankError naming the nodes that have not come."""
        self._round += 1
        keys = [f"{self._round}/{other}" for other in range(self.world_size)]
        try:
            self._store.set(keys[self.rank], json.dumps(value))
            self._wait_for(keys, self._timeout_seconds)
            return [cast(JSON, json.loads(self._store.get(key))) for key in keys]
        except dist.DistError as error:
            raise RankError(f"node {self.rank} of {self.world_size} lost node 0: {error}") from error

    def leave(self, timeout_seconds: float) -> None:
        """The last call. Node 0, which holds the store, returns when all others have left, or after the timeout."""
        try:
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self._wait_for([f"left/{other}" for other in range(self.world_size)], timeout_seconds)
        except (dist.DistError, RankError):
            return  # whoever is gone has nothing left to hear

    def _wait_for(self, keys: list[str], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = [str(other) for other, key in enumerate(keys) if not self._store.check([key])]
                raise RankError(
                    f"node {self.rank} of {self.world_size} waited {timeout_seconds:g} s for the launchers of "
                    f"nodes {', '.join(missing)}"
                )
            time.sleep(_POLL_SECONDS)

    def barrier(self) -> None:
        """Return once every launcher has arrived."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """True on all launchers if it is true on any."""
        return any(self.gather(flag))


@contextmanager
def meet(nodes: Nodes, *, timeout_seconds: float) -> Iterator[Ranks]:
    """The launchers of all nodes, met; `Alone` if there is one. Every launcher calls it once.

    Raises RankError, for a restart may help, if node 0 cannot be reached or its port is taken, and MachineError if the
    address is not one of node 0's.
    """
    if nodes.count == 1:
        yield Alone()
        return
    holder = _hold_store(nodes, timeout_seconds) if nodes.index == 0 else None
    crew = Crew(nodes, holder or reach_store(nodes, timeout_seconds), timeout_seconds)
    crew.barrier()
    try:
        yield crew
    except BaseException:
        # The others may not have read yet why.
        crew.leave(_LEAVE_SECONDS)
        raise
    crew.leave(timeout_seconds)


def reach_store(nodes: Nodes, timeout_seconds: float) -> Store:
    """A connection of its own to the store that node 0's launcher holds. Launchers and ranks call it."""
    deadline = time.monotonic() + timeout_seconds
    where = f"{nodes.address}:{nodes.port}"
    while True:
        try:
            # torch would do the waiting too, but with a page of C++ frames for each try.
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"node {nodes.index} of {nodes.count} cannot reach node 0 at {where} within {timeout_seconds:g} s: "
                    f"{error}. Check that every node reaches that address, or set MASTER_ADDR and MASTER_PORT."
                ) from error
            time.sleep(_POLL_SECONDS * 4)
    patience = timedelta(seconds=timeout_seconds)
    store = TCPStore(nodes.address, nodes.port, is_master=False, wait_for_workers=False, timeout=patience)
    return _named(store, nodes)


def interface_towards(address: str, port: int) -> str | None:
    """Name of the network interface through which this machine reaches an address; None if nothing tells.

    gloo would look up this machine's own name instead, which on many clusters resolves to nothing or to loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing: it only asks the kernel for the route
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(name, probe) == mine:
                    return name
        except OSError:
            return None
    return None


def _hold_store(nodes: Nodes, timeout_seconds: float) -> Store:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        where = f"{nodes.address}:{nodes.port}"
        try:
            listener.bind((socket.gethostbyname(nodes.address), nodes.port))
        except socket.gaierror as error:
            raise MachineError(f"node 0 cannot resolve its own address {nodes.address}: {error.strerror}") from error
        except OSError as error:
            raise RankError(
                f"node 0 cannot listen at {where}: {error.strerror}. Set MASTER_PORT to another."
            ) from error
        listener.listen(4096)
        patience = timedelta(seconds=timeout_seconds)
        store = TCPStore(
            nodes.address,
            nodes.port,
            is_master=True,
            wait_for_workers=False,
            timeout=patience,
            master_listen_fd=listener.detach(),
        )
    return _named(store, nodes)


def _named(store: Store, nodes: Nodes) -> Store:
    return PrefixStore(f"{nodes.job}.{nodes.step}", store)


def _address_of(interface: str, probe: socket.socket) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:
        return None  # it has no IPv4 address
