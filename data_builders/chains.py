"""Small graphs of two chains, for a quick start: easy to learn, without a shortcut that avoids reading the root.

Nodes 0 and 1 are the roots of two chains, and no node of one chain is reached from the other root. The end of one chain
is the target, the end of the other the distractor, and the question asks from the target's root. Both chains are drawn
by the same rule, so that a model which ignores the root of the question is at chance: in any graph, the same pair asked
from the other root is an equally likely question with the other answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import inf

from data_builders.graphs import TRIES, Edge, Graph

SOURCE_SHARE = 0.5  # probability that a node outside the chains is a further root; the others have parents
SECOND_PARENT = 0.8  # probability of a second edge into a node, if one is possible


@dataclass(frozen=True)
class ChainDials:
    """The target is `hops_from` to `hops_to` edges from its root, each distance equally often.

    If it is h away, the distractor is hops_from + hops_to - h away from its own root.
    """

    nodes: int
    hops_from: int
    hops_to: int

    def __post_init__(self) -> None:
        """Raises ValueError, which names the dial, if no graph can be drawn with these values."""
        if not 1 <= self.hops_from <= self.hops_to:
            raise ValueError(f"hops_from={self.hops_from}, hops_to={self.hops_to}; it must be 1 <= from <= to.")
        needed = self.hops_from + self.hops_to + 2
        if self.nodes < needed:
            raise ValueError(
                f"nodes={self.nodes} is too few for two chains with hops_from={self.hops_from} and "
                f"hops_to={self.hops_to}, which need hops_from + hops_to + 2 = {needed}. Raise nodes or lower the hops."
            )

    def draw(self, rng: random.Random) -> Graph:
        hops = rng.randint(self.hops_from, self.hops_to)
        for _ in range(TRIES):
            edges, ends = _grow(rng, self.nodes, hops, self.hops_from + self.hops_to - hops)
            if len({node for edge in edges for node in edge}) == self.nodes:
                return Graph(self.nodes, edges, 0, *ends) if rng.random() < 0.5 else _turned(self.nodes, edges, ends)
        raise ValueError(
            f"nodes={self.nodes} is too many for two chains of {self.hops_from} to {self.hops_to} hops: in {TRIES} "
            "graphs some node was always left without an edge. Lower nodes, or take preset=released form=symbols."
        )


def _grow(rng: random.Random, nodes: int, hops: int, other_hops: int) -> tuple[list[Edge], list[int]]:
    """The edges, and the ends of the two chains. Every node comes after its parents."""
    spare = nodes - hops - other_hops - 2
    sources = 2 + sum(rng.random() < SOURCE_SHARE for _ in range(spare))
    kinds = [0] * hops + [1] * other_hops + [2] * (nodes - sources - hops - other_hops)
    rng.shuffle(kinds)

    distance = [[inf] * nodes, [inf] * nodes]  # from either root
    distance[0][0] = distance[1][1] = 0
    ends = [0, 1]  # of the chains so far
    edges: list[Edge] = []
    for node, kind in enumerate(kinds, start=sources):
        if kind == 2:
            parents = [rng.randrange(node)]
            allowed = [p for p in range(node) if p not in parents]
        else:
            own, other, parents = distance[kind], distance[1 - kind], [ends[kind]]
            depth = own[ends[kind]]
            allowed = [p for p in range(node) if own[p] >= depth and other[p] == inf and p not in parents]
            ends[kind] = node
        if allowed and rng.random() < SECOND_PARENT:
            parents.append(rng.choice(allowed))
        for steps in distance:
            steps[node] = min(steps[p] + 1 for p in parents)
        edges += [(p, node) for p in parents]
    return edges, ends


def _turned(nodes: int, edges: list[Edge], ends: list[int]) -> Graph:
    """The graph with the two roots exchanged, so that either is asked about equally often."""
    number = {0: 1, 1: 0}
    return Graph(nodes, [(number.get(a, a), b) for a, b in edges], 1, *ends)
