"""Small directed graphs to search: ProsQA with one symbol a node, made from scratch.

Two roots are drawn, each the head of a chain of its own, and no node of one chain is reachable from
the other root. The end of one chain is the target, the end of the other the distractor, and the
question asks from the target's root. The two chains are drawn by one rule, so whoever does not read
which root is asked can do no better than guess: in any graph the same pair, asked from the other
root, is an equally likely question with the other answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import inf

from data_builders.writing import Row

Edge = tuple[int, int]

SOURCE_SHARE = 0.5  # of the nodes outside the chains, those that are further roots; the others branch off
SECOND_PARENT = 0.8  # probability of a second edge into a node, if one is possible


def graph_rows(seed: int, count: int, nodes: int = 8, min_hops: int = 2, max_hops: int = 3) -> list[Row]:
    """`count` different questions. The same arguments give the same rows.

    The target is `min_hops` to `max_hops` edges from the root, each distance equally often up to one
    row. If the target is h away, the distractor is min_hops + max_hops - h away from its own root.
    """
    check_dials(nodes, min_hops, max_hops)
    rng = random.Random(f"graphs {seed} {nodes} {min_hops} {max_hops}")
    seen: set[tuple[frozenset[Edge], int, int, int]] = set()
    rows: list[Row] = []
    for hops in _balanced(rng, count, min_hops, max_hops):
        for _ in range(1000):
            edges, root, target, distractor = _draw(rng, nodes, hops, min_hops + max_hops - hops)
            question = (frozenset(edges), root, target, distractor)
            if question not in seen:
                break
        else:
            raise ValueError(
                f"Asked for {count} different questions, but after {len(rows)} hardly any new ones come with "
                f"nodes={nodes}, min_hops={min_hops}, max_hops={max_hops}. Ask for fewer, or raise nodes."
            )
        seen.add(question)
        rows.append(_row(rng, nodes, edges, root, target, distractor))
    return rows


def check_dials(nodes: int, min_hops: int, max_hops: int) -> None:
    if not 1 <= min_hops <= max_hops:
        raise ValueError(f"min_hops={min_hops}, max_hops={max_hops}: it must be 1 <= min_hops <= max_hops.")
    if nodes < min_hops + max_hops + 2:
        raise ValueError(
            f"nodes={nodes} is too few for the chains of target and distractor with min_hops={min_hops} and "
            f"max_hops={max_hops}: they need min_hops + max_hops + 2 = {min_hops + max_hops + 2}."
        )


def _balanced(rng: random.Random, count: int, low: int, high: int) -> Iterator[int]:
    """`count` numbers of low..high, in random order within each round."""
    while count > 0:
        batch = rng.sample(range(low, high + 1), min(count, high - low + 1))
        yield from batch
        count -= len(batch)


def _draw(rng: random.Random, nodes: int, hops: int, other_hops: int) -> tuple[list[Edge], int, int, int]:
    """The edges of one graph, its root, target and distractor, with shuffled names and edges."""
    while True:
        edges, target, distractor = _build(rng, nodes, hops, other_hops)
        if len({node for edge in edges for node in edge}) == nodes:
            break
    names = rng.sample(range(nodes), nodes)
    edges = [(names[a], names[b]) for a, b in edges]
    rng.shuffle(edges)
    return edges, names[0], names[target], names[distractor]


def _build(rng: random.Random, nodes: int, hops: int, other_hops: int) -> tuple[list[Edge], int, int]:
    """Nodes 0 and 1 are the roots of the two chains; every node comes after its parents."""
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
    return edges, ends[0], ends[1]


def _row(rng: random.Random, nodes: int, edges: list[Edge], root: int, target: int, distractor: int) -> Row:
    pair = [target, distractor]
    rng.shuffle(pair)
    listed = " | ".join(f"{a} {b}" for a, b in edges)
    return {
        "question": f"{listed} ? {pair[0]} or {pair[1]} from {root}",
        "steps": [str(node) for node in shortest_path(edges, root, target)[1:]],
        "answer": str(target),
        "idx_to_symbol": [str(node) for node in range(nodes)],
        "edges": [list(edge) for edge in edges],
        "root": root,
        "target": target,
        "neg_target": distractor,
    }


def shortest_path(edges: list[Edge], root: int, target: int) -> list[int]:
    """Breadth first; among several shortest paths the one that the order of the edges gives."""
    children: dict[int, list[int]] = {}
    for a, b in edges:
        children.setdefault(a, []).append(b)
    before = {root: root}
    queue = [root]
    for node in queue:
        if node == target:
            break
        for child in children.get(node, []):
            if child not in before:
                before[child] = node
                queue.append(child)
    path = [target]
    while path[-1] != root:
        path.append(before[path[-1]])
    return path[::-1]
