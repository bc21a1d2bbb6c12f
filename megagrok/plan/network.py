"""Seconds of one message on a network of two levels: links within a node, one port per GPU between nodes.

A ring crosses a node's border through the ports of the ranks it has there; an all-to-all sends each rank's rows through
that rank's own port. Latency grows with the doublings of ranks.
"""

import math
from dataclasses import dataclass

from megagrok.plan.constants import Constants
from megagrok.plan.cost import Machine
from megagrok.plan.shape import Habits
from megagrok.plan.work import Message


@dataclass(frozen=True, slots=True)
class Span:
    """Ranks of a group, `stride` apart in the order in which nodes are filled."""

    ranks: int
    stride: int

    def per_node(self, gpus_per_node: int) -> int:
        """Of its ranks, those that share a node."""
        return min(self.ranks, gpus_per_node // self.stride) if self.stride < gpus_per_node else 1


def message_seconds(
    message: Message, span: Span, machine: Machine, habits: Habits, constants: Constants, top_k: int
) -> float:
    """All calls of a message, nothing hidden. top_k: experts of a token; a fused dispatch sends it once to a node."""
    if span.ranks == 1:
        return 0.0
    per_node = max(1, span.per_node(machine.gpus_per_node))
    nodes = math.ceil(span.ranks / per_node)
    links = machine.gpu.nvlink_bandwidth * constants.nvlink
    port = machine.network_bandwidth * constants.network * nodes**-constants.network_fall
    latency = constants.nvlink_latency * math.log2(per_node) + constants.network_latency * math.log2(nodes)
    size = message.size
    if message.op == "send":
        seconds = size / (links if nodes == 1 else port)
    elif message.op != "all_to_all":
        ring = links if nodes == 1 else min(links, per_node**constants.rails * port)
        seconds = (2 if message.op == "all_reduce" else 1) * size * (span.ranks - 1) / span.ranks / ring
    elif habits.dispatch == "fused":
        far_nodes_hit = (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)
        seconds = max(size / top_k * far_nodes_hit / port, size * (per_node - 1) / per_node / links)
    else:
        near, far = (per_node - 1) / span.ranks, (span.ranks - per_node) / span.ranks
        seconds = size * (near / links + far / port) / constants.exchange
    return message.calls * (seconds + latency)
