"""Whether nodes talk to each other fast enough, and if not, which of them does not.

Not the measurement itself (megagrok/parallel/bandwidth.py), which imports torch and runs in steps of its own. The one
idea: all at once says whether, neighbours in a ring say who: a slow node spoils both of its pairs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Measure = Callable[[Sequence[str], int], float | None]
"""(nodes, a number that differs among measurements of one round) -> GB/s, or None if they did not even meet."""


def slow_nodes(nodes: Sequence[str], needed: int, measure: Measure, least: float) -> dict[str, list[str]]:
    """For each node that is too slow, why.

    nodes: all that are otherwise fit, the first `needed` of which would be used.  least: GB/s.
    """
    used = nodes[:needed]
    together = measure(used, 0)
    if together is not None and together >= least:
        return {}
    if len(nodes) < 3:
        return {node: [f"{_words(together)} with {len(used)} nodes together, needs {least:g} GB/s"] for node in used}
    pairs = [(number, (number + 1) % len(nodes)) for number in range(len(nodes))]
    found: dict[tuple[int, int], float | None] = {}
    # Pairs of a round share no node. A ring of an odd number has one pair left over.
    for turn in (pairs[0 : len(nodes) - 1 : 2], pairs[1 : len(nodes) - 1 : 2], pairs[len(nodes) - 1 :]):
        with ThreadPoolExecutor(max_workers=len(turn)) as pool:
            results = pool.map(lambda pair: measure([nodes[pair[0]], nodes[pair[1]]], pair[0]), turn)
            found |= dict(zip(turn, results, strict=True))
    slow = {}
    for number, node in enumerate(nodes):
        both = [result for pair, result in found.items() if number in pair]
        best = max((result for result in both if result is not None), default=None)
        if best is None or best < least:
            slow[node] = [f"{_words(best)} with either neighbour, needs {least:g} GB/s"]
    # No single node is slow, and yet all together are: the network between them is.
    return slow or {node: [f"{_words(together)} with all {len(used)} nodes, needs {least:g} GB/s"] for node in used}


def _words(result: float | None) -> str:
    return "no connection" if result is None else f"{result:.3g} GB/s"
