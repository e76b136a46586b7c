"""Where the nodes of a graph stand in a picture of it."""

from __future__ import annotations

from typing import Any

import networkx

Point = tuple[float, float]


def place_nodes(graph: networkx.DiGraph, root: str) -> dict[str, Point]:
    """Column and, downwards from 0, row: by distance from the root, and below what it does not reach."""
    reached = networkx.single_source_shortest_path_length(graph, root)
    rest = graph.subgraph(node for node in graph if node not in reached)
    apart = dict.fromkeys(rest, 0)
    if networkx.is_directed_acyclic_graph(rest):
        for column, nodes in enumerate(networkx.topological_generations(rest)):
            apart |= dict.fromkeys(nodes, column)
    places: dict[str, Point] = {}
    top = 0.0
    for depth in (reached, apart):
        columns = _columns(graph, depth)
        height = max(map(len, columns), default=0)
        for x, column in enumerate(columns):
            first = top + (height - len(column)) / 2
            places |= {node: (float(x), -first - i) for i, node in enumerate(column)}
        top += height
    return places


def _columns(graph: networkx.DiGraph, depth: dict[str, int]) -> list[list[str]]:
    """The nodes by depth, each column ordered by where its neighbours in the column beside it stand."""
    columns = [[n for n in graph if depth.get(n) == d] for d in range(1 + max(depth.values(), default=-1))]

    def sort(column: list[str], beside: list[str], neighbours: Any) -> None:
        place = {node: i for i, node in enumerate(beside)}
        found = {node: [place[n] for n in neighbours(node) if n in place] for node in column}
        mean = {node: sum(at) / len(at) if at else len(beside) / 2 for node, at in found.items()}
        column.sort(key=lambda node: mean[node])

    for _ in range(3):
        for left, right in networkx.utils.pairwise(columns):
            sort(right, left, graph.predecessors)
        for left, right in list(networkx.utils.pairwise(columns))[::-1]:
            sort(left, right, graph.successors)
    return columns
