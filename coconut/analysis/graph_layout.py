"""Place the nodes of a graph for drawing."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import networkx

Point = tuple[float, float]


def place_nodes(graph: networkx.DiGraph, root: str) -> dict[str, Point]:
    """The (x, y) of each node: x is its distance from the root, y is 0 in the top row and decreases downwards.

    Nodes that the root does not reach are placed below the others.
    """
    reached_depth = networkx.single_source_shortest_path_length(graph, root)
    unreached = graph.subgraph(node for node in graph if node not in reached_depth)
    unreached_depth = dict.fromkeys(unreached, 0)
    if networkx.is_directed_acyclic_graph(unreached):
        for column, nodes in enumerate(networkx.topological_generations(unreached)):
            unreached_depth |= dict.fromkeys(nodes, column)
    places: dict[str, Point] = {}
    top = 0.0
    for depth in (reached_depth, unreached_depth):
        columns = _columns(graph, depth)
        height = max(map(len, columns), default=0)
        for x, column in enumerate(columns):
            first = top + (height - len(column)) / 2
            places |= {node: (float(x), -first - i) for i, node in enumerate(column)}
        top += height
    return places


def _columns(graph: networkx.DiGraph, depth: dict[str, int]) -> list[list[str]]:
    """The nodes by depth. Each column is sorted by the mean position of neighbours in the adjacent column."""
    columns = [[n for n in graph if depth.get(n) == d] for d in range(1 + max(depth.values(), default=-1))]

    def sort(column: list[str], beside: list[str], neighbours: Any) -> None:
        index = {node: i for i, node in enumerate(beside)}
        mean = {node: fmean([index[n] for n in neighbours(node) if n in index] or [len(beside) / 2]) for node in column}
        column.sort(key=lambda node: mean[node])

    for _ in range(3):
        for left, right in networkx.utils.pairwise(columns):
            sort(right, left, graph.predecessors)
        for left, right in list(networkx.utils.pairwise(columns))[::-1]:
            sort(left, right, graph.successors)
    return columns
