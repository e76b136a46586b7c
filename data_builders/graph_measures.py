"""Statistics of rows with a graph, and whether two rows ask the same question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import networkx

from coconut.tasks import prosqa
from data_builders.parallel_generation import Row
from data_builders.statistics import Measures

_MASK = (1 << 64) - 1


def shape(count: int, edges: Iterable[Sequence[int]], root: int, options: tuple[int, int]) -> int:
    """A 64-bit hash of a question that renaming the nodes or reordering the edges does not change.

    By three rounds of colour refinement (Weisfeiler-Leman): a node starts with its role (root, option or neither) and
    takes up the colours of its parents and of its children.
    """
    parents, children = _neighbours(count, edges)
    nodes = range(count)
    roles = {root: 2, options[0]: 3, options[1]: 3}
    colours = [_mix(roles.get(node, 1)) for node in nodes]
    for _ in range(3):
        of = colours.__getitem__
        colours = [_mix(3 * colours[n] + 5 * sum(map(of, parents[n])) + 7 * sum(map(of, children[n]))) for n in nodes]
    return _mix(sum(colours))


def _mix(number: int) -> int:
    """A 64-bit mixing function: every bit of the result depends on all bits of the number."""
    number = (number & _MASK) * 0x9E3779B97F4A7C15 & _MASK
    return ((number ^ number >> 29) * 0xBF58476D1CE4E5B9 & _MASK) ^ number >> 32


def key_of(row: Row) -> int:
    return shape(len(row["idx_to_symbol"]), row["edges"], row["root"], (row["target"], row["neg_target"]))


# A row is verified and then measured; the cache of one question avoids parsing its text twice.
parsed = lru_cache(maxsize=1)(prosqa.parse_question)


def alike(row: Row, other: Row) -> bool:
    """Whether two rows ask the same question of the same graph, up to the names of the nodes."""
    graphs = []
    for r in (row, other):
        graph = networkx.DiGraph()
        roles = {r["root"]: "root", r["target"]: "option", r["neg_target"]: "option"}
        graph.add_nodes_from((node, {"role": roles.get(node)}) for node in range(len(r["idx_to_symbol"])))
        graph.add_edges_from(r["edges"])
        graphs.append(graph)
    return networkx.is_isomorphic(*graphs, node_match=lambda a, b: a["role"] == b["role"])


_LABELS = ("neither root", "the first root only", "the second root only", "both roots")


def measure(row: Row) -> Measures:
    """The statistics of one row that docs/data.md compares.

    The other root is the first node without parents from which the distractor is reached and the target is
    not: node 0 or 1 in rows made here and in the released ones.
    """
    nodes = range(len(row["idx_to_symbol"]))
    parents, children = _neighbours(len(row["idx_to_symbol"]), row["edges"])
    own = _distances(children, row["root"])
    heads = {node: _distances(children, node) for node in nodes if not parents[node] and node != row["root"]}
    reaching = [node for node, far in heads.items() if row["neg_target"] in far and row["target"] not in far]
    others = heads[reaching[0]] if reaching else {}
    roots = sorted([row["root"], *reaching[:1]])
    root, other = roots.index(row["root"]), 1 - roots.index(row["root"])
    from_root = [own, others] if root == 0 else [others, own]
    labels = [(node in from_root[0]) + 2 * (node in from_root[1]) for node in nodes]
    leaves = [[n for n in nodes if not children[n] and labels[n] == family + 1] for family in (0, 1)]
    deepest = [max((from_root[f][n] for n in leaves[f]), default=0) for f in (0, 1)]
    asked = parsed(row["question"])
    symbols = row["idx_to_symbol"]
    number = {name: node for node, name in enumerate(symbols)}
    places = {tuple(edge): place for place, edge in enumerate(row["edges"])}
    told = [places[number[a], number[b]] for a, b in asked.edges]
    ways = {row["root"]: 1}
    for node in sorted(own, key=own.__getitem__):
        if node != row["root"]:
            ways[node] = sum(ways[p] for p in parents[node] if own.get(p) == own[node] - 1)
    persons = [node for node in nodes if not parents[node]]
    every = row["question"].count("Every ")
    words = {} if asked.symbolic else {
        "form of a sentence": {"Every X is a Y.": every, "X is a Y.": len(asked.edges) - every},
        "names of persons": [symbols[node] for node in persons],
        "names of concepts": [symbols[node] for node in nodes if parents[node]],
        "persons are the nodes without parents": _yes({n for n in nodes if symbols[n][0].isupper()} == set(persons)),
    }  # fmt: skip
    return {
        "nodes": float(len(nodes)),
        "edges": float(len(row["edges"])),
        "hops to the target": str(own[row["target"]]),
        "steps are a shortest path": _yes(len(row["steps"]) == own[row["target"]]),
        "shortest paths to the target": float(ways[row["target"]]),
        "root": f"node {row['root']}",
        "nodes reached by": [_LABELS[label] for label in labels],
        "parents of a node": [_up_to(len(parents[node]), 6) for node in nodes if node not in roots],
        "children of a node": [_up_to(len(children[node]), 7) for node in nodes],
        "nodes without parents": float(len(persons)),
        "depth of a node": [float(far) for distances in from_root for far in distances.values()],
        "leaves of the root's family": float(len(leaves[root])),
        "leaves of the other family": float(len(leaves[other])),
        "target is a leaf that only its root reaches": _yes(row["target"] in leaves[root]),
        "target is a deepest such leaf": _yes(own[row["target"]] == deepest[root]),
        "target's family against the other": _than(deepest[root], deepest[other]),
        "distractor is a leaf that only the other root reaches": _yes(row["neg_target"] in leaves[other]),
        "distractor is a deepest such leaf": _yes(others.get(row["neg_target"]) == deepest[other]),
        "depth of the distractor": str(others.get(row["neg_target"], "out of reach")),
        "distractor against target": _than(others.get(row["neg_target"], 0), own[row["target"]]),
        "place of the target among the nodes": row["target"] / len(nodes),
        "place of the distractor among the nodes": row["neg_target"] / len(nodes),
        "right option named first": _yes(asked.options[0] == symbols[row["target"]]),
        "next sentence is of a later edge": [_yes(b > a) for a, b in pairwise(told)],
        **words,
    }


def _neighbours(count: int, edges: Iterable[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The parents and the children of every node."""
    parents: list[list[int]] = [[] for _ in range(count)]
    children: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        children[a].append(b)
        parents[b].append(a)
    return parents, children


def _distances(children: list[list[int]], root: int) -> dict[int, int]:
    distances, queue = {root: 0}, [root]
    for node in queue:
        for child in children[node]:
            if child not in distances:
                distances[child] = distances[node] + 1
                queue.append(child)
    return distances


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _up_to(count: int, most: int) -> str:
    return str(count) if count < most else f"{most}+"


def _than(a: int, b: int) -> str:
    return "deeper" if a > b else "as deep" if a == b else "less deep"
