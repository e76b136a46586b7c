"""Questions with a graph: what lies where in it, what kind of path a model wrote, and how to change an edge.

Pure strings and graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import NamedTuple

import networkx

from coconut.tasks import prosqa


class Outcome(StrEnum):
    """Of an answer: by the path that it writes, or where it writes none by its label (arXiv 2412.06769, section 5)."""

    correct_path = "correct_path"  # one of the shortest from the root to the target
    longer_path = "longer_path"  # reaches the target, and is not one of the shortest
    hallucination = "hallucination"  # an edge that is not there, disconnected, or not of the written form
    wrong_target = "wrong_target"  # its edges are there; it ends elsewhere
    correct_label = "correct_label"
    incorrect_label = "incorrect_label"


@dataclass(frozen=True, eq=False)
class GraphQuestion:
    """A question and its answer as a graph. `target` is the right option, `other` the wrong one."""

    graph: networkx.DiGraph
    root: str
    target: str
    other: str
    symbolic: bool

    @classmethod
    def read(cls, question: str, answer: str) -> GraphQuestion:
        """Raises ValueError if the question tells no graph or the answer is none of its two options."""
        parsed = prosqa.parse_question(question)
        target = prosqa.read_target(answer)
        if target not in parsed.options:
            raise ValueError(f"The answer {answer!r} is none of the two options, {' and '.join(parsed.options)}.")
        first, second = parsed.options
        other = second if target == first else first
        return cls(prosqa.graph(question), parsed.root, target, other, parsed.symbolic)

    @cached_property
    def distance(self) -> dict[str, int]:
        """Edges from the root, of each node that it reaches."""
        return dict(networkx.single_source_shortest_path_length(self.graph, self.root))

    @cached_property
    def remaining(self) -> dict[str, int]:
        """Edges to the target, of each node that leads to it."""
        return _distances_to(self.graph, [self.target])

    @property
    def hops(self) -> int | None:
        """Edges of the shortest way from the root to the target; None if there is none."""
        return self.distance.get(self.target)

    def on_shortest_way(self, node: str) -> bool:
        if node not in self.distance or node not in self.remaining:
            return False
        return self.distance[node] + self.remaining[node] == self.hops

    @cached_property
    def shortest_heights(self) -> dict[str, int]:
        """Edges to the nearest leaf, of each node from which there is one."""
        return _distances_to(self.graph, [node for node in self.graph if not self.graph.out_degree(node)])

    @cached_property
    def longest_heights(self) -> dict[str, int]:
        """Edges to the farthest leaf, of each node; empty where the graph has a cycle."""
        heights: dict[str, int] = {}
        if networkx.is_directed_acyclic_graph(self.graph):
            for node in reversed(list(networkx.topological_sort(self.graph))):
                heights[node] = max((1 + heights[child] for child in self.graph.successors(node)), default=0)
        return heights


def _distances_to(graph: networkx.DiGraph, nodes: Sequence[str]) -> dict[str, int]:
    """Edges to the nearest of these nodes, of each node that leads to one."""
    return {
        node: distance
        for distance, layer in enumerate(networkx.bfs_layers(graph.reverse(copy=False), nodes))
        for node in layer
    }


def classify(asked: GraphQuestion, steps: Sequence[str], answered_right: bool, *, hidden: bool) -> Outcome:
    """What kind of path these written steps are; without any, by whether the answer is right.

    With `hidden`, what comes before the steps was thought and not written: they may begin at any node to
    which the root leads, and the shortest way there completes them. Otherwise they begin at the root. In
    symbols a step names the node that it goes to, and the edge to the first one is hidden or the root's; a
    path that names the root first is written whole.
    """
    if not steps:
        return Outcome.correct_label if answered_right else Outcome.incorrect_label
    edges = prosqa.parse_path(list(steps), asked.root, asked.symbolic)
    if not edges:
        return Outcome.hallucination
    if asked.symbolic and edges[0][1] == asked.root:
        begin, before, edges = asked.root, 0, edges[1:]
    elif hidden and asked.symbolic:
        begin, edges = edges[0][1], edges[1:]
        before = _least_edges_to(asked, begin)
    elif hidden:
        begin = edges[0][0]
        before = asked.distance.get(begin)
    else:
        begin = edges[0][0]
        before = 0 if begin == asked.root else None
    connected = all(first[1] == second[0] for first, second in pairwise(edges))
    if before is None or not connected or not all(asked.graph.has_edge(*edge) for edge in edges):
        return Outcome.hallucination
    if (edges[-1][1] if edges else begin) != asked.target:
        return Outcome.wrong_target
    return Outcome.correct_path if before + len(edges) == asked.hops else Outcome.longer_path


def _least_edges_to(asked: GraphQuestion, node: str) -> int | None:
    """Edges, at least one, of the shortest way from the root to a node."""
    if node not in asked.graph:
        return None
    ways = [asked.distance[parent] + 1 for parent in asked.graph.predecessors(node) if parent in asked.distance]
    return min(ways, default=None)


# --- the same question with an edge changed -------------------------------------------------------


class Redirection(NamedTuple):
    """A question in which exactly the other option is reachable, and what was done for it.

    `swapped`: two edges swapped their heads, so that every node has as many edges in and out as before.
    `same_hops`: the way to the new right option is as long as the one to the old was.
    """

    question: str
    swapped: bool
    same_hops: bool


def redirect(question: str, asked: GraphQuestion, random: Random) -> Redirection | None:
    """Turn an edge on the way to the target towards the other option; None if no single change does it.

    Preferred are two edges that swap their heads, then a way of the same length; among equals chance decides.
    """
    edges = prosqa.parse_question(question).edges
    towards_other = _distances_to(asked.graph, [asked.other])
    cuts = _cuts(edges, asked)
    swaps: list[Changes] = [
        {i: (edges[i][0], head), j: (tail, edges[i][1])}
        for i in cuts
        for j, (tail, head) in enumerate(edges)
        if head in towards_other and tail not in asked.distance
    ]
    heads = sorted({head for _, head in edges if head in towards_other})
    turns: list[Changes] = [{i: (edges[i][0], head)} for i in cuts for head in heads]
    acyclic = networkx.is_directed_acyclic_graph(asked.graph)
    for swapped, ways in ((True, swaps), (False, turns)):
        lengths = [_hops_to_other(edges, changes, asked, acyclic) for changes in ways]
        for same_hops in (True, False):
            fitting = [
                changes
                for changes, hops in zip(ways, lengths, strict=True)
                if hops is not None and (hops == asked.hops) is same_hops
            ]
            if fitting:
                return Redirection(_with_changes(question, edges, random.choice(fitting)), swapped, same_hops)
    return None


def remove_on_way(question: str, asked: GraphQuestion, random: Random) -> str | None:
    """Without an edge that all ways to the target take, so that neither option is reachable; None if there is none.

    The root keeps an edge where it can, so that the question still tells where it starts.
    """
    edges = prosqa.parse_question(question).edges
    cuts = _cuts(edges, asked)
    alone = [i for i, edge in enumerate(edges) if asked.root in edge]
    cuts = [i for i in cuts if alone != [i]] or cuts
    return _with_changes(question, edges, {random.choice(cuts): None}) if cuts else None


def remove_elsewhere(question: str, asked: GraphQuestion, random: Random) -> str | None:
    """Without an edge that is on no way from the root to the target, and on none to the other option."""
    edges = prosqa.parse_question(question).edges
    towards_other = _distances_to(asked.graph, [asked.other])
    apart = [
        i
        for i, (tail, head) in enumerate(edges)
        if head not in towards_other and not (tail in asked.distance and head in asked.remaining)
    ]
    return _with_changes(question, edges, {random.choice(apart): None}) if apart else None


Changes = Mapping[int, prosqa.Edge | None]  # by the place of an edge in the question


def _changed(edges: Sequence[prosqa.Edge], changes: Changes) -> list[prosqa.Edge | None]:
    return [changes.get(i, edge) for i, edge in enumerate(edges)]


def _with_changes(question: str, edges: Sequence[prosqa.Edge], changes: Changes) -> str:
    return prosqa.with_edges(question, _changed(edges, changes))


def _cuts(edges: Sequence[prosqa.Edge], asked: GraphQuestion) -> list[int]:
    """The edges without which the target is not reachable; none if it never was, or if both options are."""
    if asked.hops is None or asked.other in asked.distance:
        return []
    on_way = [i for i, (tail, head) in enumerate(edges) if tail in asked.distance and head in asked.remaining]
    return [i for i in on_way if asked.target not in _distances_from(asked.root, _changed(edges, {i: None}))]


def _hops_to_other(edges: Sequence[prosqa.Edge], changes: Changes, asked: GraphQuestion, acyclic: bool) -> int | None:
    """How far the other option is after the changes; None if they do not leave a sound question with it alone."""
    after = [edge for edge in _changed(edges, changes) if edge]
    reached = _distances_from(asked.root, after)
    if asked.target in reached or len(set(after)) < len(after) or any(tail == head for tail, head in after):
        return None
    if acyclic and not networkx.is_directed_acyclic_graph(networkx.DiGraph(after)):
        return None
    return reached.get(asked.other)


def _distances_from(root: str, edges: Sequence[prosqa.Edge | None]) -> dict[str, int]:
    graph = networkx.DiGraph(edge for edge in edges if edge)
    graph.add_node(root)
    return dict(networkx.single_source_shortest_path_length(graph, root))
