"""Random directed acyclic graphs with a question: which of two leaves can be reached from a root?

Nodes 0 and 1 are the two roots that are asked about. Every further node draws its parents among the
nodes before it: from the first root's family (what only that root reaches), from the second's, or from
all nodes. The graph of a question has a target, a leaf of the asked root's family, and a distractor, a
leaf of the other's, which the asked root therefore does not reach.

After the appendix of Hao et al. (arXiv 2412.06769), with changes where the released data require them; docs/data.md has
the comparison.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import exp, inf, isinf

Edge = tuple[int, int]

TRIES = 3000  # graphs drawn for one question before giving up
MOST_NODES = 500
NEITHER, BOTH = 0, 3  # labels: bit f is set if root f reaches the node


class Wanting(Enum):
    """Why a graph gives no question, and the remedy, as shown in the error message."""

    edges = "they have another number of edges. Change edges, or raise nodes."
    leaves = "no leaf is reached by one root only. Raise nodes, or lower branching or edges."
    hops = "no leaf is as far from its root as asked. Widen the hops, raise nodes, lower branching, or set plant=true."


@dataclass(frozen=True)
class Graph:
    """Edges run from lower to higher node; 0 and 1 are the roots, one of which is asked about."""

    nodes: int
    edges: list[Edge]
    root: int
    target: int
    distractor: int


@dataclass(frozen=True)
class GraphDials:
    """How graphs are drawn, and which of their leaves are asked about.

    nodes: the number drawn; nodes without an edge are dropped afterwards.
    branching: mean number of a node's parents, Poisson distributed.
    edges: the exact number in every graph, in place of `branching`.
    depth_weight: a parent d edges from its root is drawn with weight 1 + depth_weight * d.
    first_family, second_family: share of the nodes that draw parents from this family only.
    as_printed: as in the paper's algorithm, nodes that neither root reaches are parents for both families, too, and
    nodes that both or neither reach have a depth above 0.
    hops_from, hops_to: distance of the target from its root, in edges.
    plant: plant a chain of the wanted length first, each length equally often, so that long paths are not rare.
    equalize_depth: target and distractor are equally deep, and either root is asked equally often.
    Otherwise the target is a deepest leaf of the deeper family, the distractor any leaf of the other.
    """

    nodes: int
    branching: float
    edges: int | None
    depth_weight: float
    first_family: float
    second_family: float
    as_printed: bool
    hops_from: int
    hops_to: int | None
    plant: bool
    equalize_depth: bool

    def __post_init__(self) -> None:
        """Raises ValueError, which names the dial, if no graph can be drawn with these values."""
        if self.hops_from < 1 or (self.hops_to is not None and self.hops_to < self.hops_from):
            raise ValueError(
                f"hops_from={self.hops_from}, hops_to={self.hops_to}; it must be 1 or more, and hops_to not less."
            )
        if self.plant and self.hops_to is None:
            raise ValueError(f"plant=true draws a length from hops_from={self.hops_from} to hops_to: give hops_to=N.")
        longest = self.hops_to if self.plant and self.hops_to else self.hops_from
        needed = 2 + 2 * longest if self.equalize_depth else 3 + longest
        if self.nodes < needed:
            chains = "two chains" if self.equalize_depth else "a chain and a distractor"
            raise ValueError(
                f"nodes={self.nodes} is too few for {chains} of {longest} hops, which need {needed}. "
                "Raise nodes, or lower hops_from and hops_to."
            )
        if not 0 < self.branching <= 20:
            raise ValueError(f"branching={self.branching}; the mean number of parents must be above 0 and at most 20.")
        if self.nodes > MOST_NODES:
            raise ValueError(f"nodes={self.nodes}; at most {MOST_NODES} are drawn.")
        if self.edges is not None and not needed - 2 <= self.edges <= (self.nodes - 2) ** 2 // 4:
            raise ValueError(
                f"edges={self.edges}; with nodes={self.nodes} and these hops it must be {needed - 2} to "
                f"{(self.nodes - 2) ** 2 // 4}."
            )
        if not 0 <= self.depth_weight <= 1000:
            raise ValueError(f"depth_weight={self.depth_weight}; it must be 0 to 1000.")
        shares = self.first_family, self.second_family
        if not (shares[0] > 0 and shares[1] > 0 and sum(shares) <= 1):
            raise ValueError(
                f"first_family={shares[0]}, second_family={shares[1]}: both must be above 0, and together at most 1."
            )

    def draw(self, rng: random.Random) -> Graph:
        """Draw a graph with a question. Raises ValueError if TRIES draws give none."""
        hops = rng.randint(self.hops_from, self.hops_to or self.hops_from) if self.plant else None
        wanting: Counter[Wanting] = Counter()
        for _ in range(TRIES):
            parents, ends = _grow(rng, self, hops)
            found = _ask(rng, self, parents, ends)
            if not isinstance(found, Wanting):
                return _without_isolated(parents, *found)
            wanting[found] += 1
        (reason, count), *_ = wanting.most_common()
        drawn = f"branching={self.branching}" if self.edges is None else f"edges={self.edges}"
        asked = f"nodes={self.nodes}, {drawn}, hops_from={self.hops_from}, hops_to={self.hops_to}"
        raise ValueError(f"None of {TRIES} graphs gives a question with {asked}. Of {count}: {reason.value}")


class _Pool:
    """Nodes that may become parents, drawn by weight."""

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.cumulated: list[float] = []

    def add(self, node: int, weight: float) -> None:
        self.nodes.append(node)
        self.cumulated.append((self.cumulated[-1] if self.cumulated else 0.0) + weight)

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """Draw `count` different nodes, or all if there are fewer."""
        drawn: dict[int, None] = {}
        count = min(count, len(self.nodes))
        while len(drawn) < count:
            place = bisect(self.cumulated, rng.random() * self.cumulated[-1], hi=len(self.nodes) - 1)
            drawn[self.nodes[place]] = None
        return list(drawn)


def _grow(rng: random.Random, dials: GraphDials, hops: int | None) -> tuple[list[list[int]], list[int]]:
    """The parents of every node, and the ends of the planted chains, if any are planted: by family."""
    counts = _numbers_of_parents(rng, dials)
    chains = _chains(rng, dials, hops)
    parents: list[list[int]] = [[], []]
    labels, depths = [1, 2], [0, 0]
    pools = [_Pool(), _Pool(), _Pool()]  # first family, second family, all
    for root in (0, 1):
        pools[root].add(root, 1.0)
        pools[2].add(root, 1.0)
    ends = [0, 1]
    for node in range(2, dials.nodes):
        family = chains.get(node)
        if family is None:
            chance = rng.random()
            pool = 0 if chance <= dials.first_family else 1 if chance <= dials.first_family + dials.second_family else 2
            drawn = pools[pool].draw(rng, counts[node])
        else:
            before = ends[family]
            others = pools[family].draw(rng, counts[node] - 1)
            drawn = [p for p in others if depths[p] >= depths[before] and p != before]
            drawn.append(before)
            ends[family] = node
        label = 0
        for parent in drawn:
            label |= labels[parent]
        kin = drawn if dials.as_printed else [p for p in drawn if label not in (NEITHER, BOTH) and labels[p] == label]
        depth = min((depths[p] for p in kin), default=-1) + 1
        parents.append(drawn)
        labels.append(label)
        depths.append(depth)
        if family is not None and depth == hops:
            continue
        weight = 1.0 + dials.depth_weight * depth
        pools[2].add(node, weight)
        offered = (0, 1) if label == NEITHER and dials.as_printed else {1: (0,), 2: (1,)}.get(label, ())
        for pool in offered:
            pools[pool].add(node, weight)
    return parents, ends if chains else []


def _numbers_of_parents(rng: random.Random, dials: GraphDials) -> list[int]:
    """The number of parents of each node: Poisson distributed, or, with a fixed number of edges, multinomial."""
    if dials.edges is None:
        cumulated = _poisson(dials.branching)
        return [bisect(cumulated, rng.random()) for _ in range(dials.nodes)]
    counts = [0] * dials.nodes
    for _ in range(dials.edges):
        counts[rng.randrange(2, dials.nodes)] += 1
    return counts


@cache
def _poisson(mean: float) -> list[float]:
    """The cumulative Poisson distribution, up to where it is 1 in floating point."""
    probability = exp(-mean)
    cumulated = [probability]
    while cumulated[-1] + probability > cumulated[-1]:
        probability *= mean / len(cumulated)
        cumulated.append(cumulated[-1] + probability)
    return cumulated


def _chains(rng: random.Random, dials: GraphDials, hops: int | None) -> dict[int, int]:
    """The nodes of the planted chains, with the family of each."""
    if hops is None:
        return {}
    families = [0, 1] if dials.equalize_depth else [rng.randrange(2)]
    links = rng.sample(range(2, dials.nodes), hops * len(families))
    return {node: families[place // hops] for place, node in enumerate(links)}


def _ask(
    rng: random.Random, dials: GraphDials, parents: list[list[int]], ends: list[int]
) -> tuple[int, int, int] | Wanting:
    """Root, target and distractor of a question, or the reason why the graph gives none."""
    if dials.edges is not None and sum(map(len, parents)) != dials.edges:
        return Wanting.edges
    distances = [_distances(parents, root) for root in (0, 1)]
    inner = {p for drawn in parents for p in drawn}
    leaves = [
        {node: own[node] for node in range(2, len(parents)) if not isinf(own[node]) and isinf(other[node])
         and node not in inner}
        for own, other in (distances, distances[::-1])
    ]  # fmt: skip
    if not leaves[0] or not leaves[1]:
        return Wanting.leaves
    least, most = dials.hops_from, inf if dials.hops_to is None else dials.hops_to
    if ends:
        planted = [family for family in (0, 1) if ends[family] > 1]
        root = rng.choice(planted)
        return root, ends[root], ends[1 - root] if len(planted) == 2 else rng.choice(list(leaves[1 - root]))
    if dials.equalize_depth:
        shared = sorted({depth for depth in leaves[0].values() if least <= depth <= most} & set(leaves[1].values()))
        if not shared:
            return Wanting.hops
        depth = rng.choice(shared)
        pair = [rng.choice([node for node, d in family.items() if d == depth]) for family in leaves]
        root = rng.randrange(2)
        return root, pair[root], pair[1 - root]
    deepest = [max(family.values()) for family in leaves]
    root = rng.randrange(2) if deepest[0] == deepest[1] else int(deepest[1] > deepest[0])
    if not least <= deepest[root] <= most:
        return Wanting.hops
    target = rng.choice([node for node, depth in leaves[root].items() if depth == deepest[root]])
    return root, target, rng.choice(list(leaves[1 - root]))


def _distances(parents: list[list[int]], root: int) -> list[float]:
    """Edges from the root to each node; infinite where it does not reach."""
    distances = [inf] * len(parents)
    distances[root] = 0
    for node, drawn in enumerate(parents):
        if drawn:
            distances[node] = min(distances[p] for p in drawn) + 1
    return distances


def _without_isolated(parents: list[list[int]], root: int, target: int, distractor: int) -> Graph:
    used = sorted({p for drawn in parents for p in drawn} | {node for node, drawn in enumerate(parents) if drawn})
    number = {node: place for place, node in enumerate(used)}
    edges = [(number[p], number[node]) for node, drawn in enumerate(parents) for p in drawn]
    return Graph(len(used), edges, number[root], number[target], number[distractor])
