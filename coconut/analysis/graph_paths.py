"""Graph questions: distances in the graph, the class of a written path, and changes of an edge.

Everything here works on strings and graphs and needs no model.
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
    """The class of an answer by its written path, or by its label if it has no path (arXiv 2412.06769, section 5)."""

    correct_path = "correct_path"  # a shortest path from the root to the target
    longer_path = "longer_path"  # reaches the target, but is not a shortest path
    hallucination = "hallucination"  # an edge that the graph lacks, a gap between edges, or a step that is not parsed
    wrong_target = "wrong_target"  # all edges are in the graph; it ends at another node
    correct_label = "correct_label"  # no path; the answer is right
    incorrect_label = "incorrect_label"  # no path; the answer is wrong


@dataclass(frozen=True, eq=False)
class GraphQuestion:
    """A question and its answer as a graph. `target` is the right option, `other` the wrong one."""

    text: str
    edges: Sequence[prosqa.Edge]
    graph: networkx.DiGraph
    root: str
    target: str
    other: str
    symbolic: bool

    @classmethod
    def read(cls, question: str, answer: str) -> GraphQuestion:
        """Raises ValueError if the question describes no graph, or the gold answer is none of its two options."""
        parsed, target = prosqa.parse_question(question), prosqa.read_target(answer)
        if target not in parsed.options:
            raise ValueError(f"The answer {answer!r} is none of the two options, {' and '.join(parsed.options)}.")
        first, second = parsed.options
        other = second if target == first else first
        return cls(question, parsed.edges, prosqa.graph(question), parsed.root, target, other, parsed.symbolic)

    @cached_property
    def distance(self) -> dict[str, int]:
        """The number of edges from the root, for each node that it reaches."""
        return dict(networkx.single_source_shortest_path_length(self.graph, self.root))

    @cached_property
    def remaining(self) -> dict[str, int]:
        """The number of edges to the target, for each node that leads to it."""
        return _distances_to(self.graph, [self.target])

    @property
    def hops(self) -> int | None:
        """The length of a shortest path from the root to the target; None if there is no path."""
        return self.distance.get(self.target)

    def on_path(self, edge: prosqa.Edge) -> bool:
        """Whether an edge is on a path from the root to the target."""
        return edge[0] in self.distance and edge[1] in self.remaining

    def on_shortest_path(self, node: str) -> bool:
        """Whether a node is on a shortest path from the root to the target."""
        on_path = node in self.distance and node in self.remaining
        return on_path and self.distance[node] + self.remaining[node] == self.hops

    @cached_property
    def shortest_heights(self) -> dict[str, int]:
        """The number of edges to the nearest leaf, for each node that leads to a leaf."""
        return _distances_to(self.graph, [node for node in self.graph if not self.graph.out_degree(node)])

    @cached_property
    def longest_heights(self) -> dict[str, int]:
        """The number of edges to the farthest leaf, for each node; empty if the graph has a cycle."""
        heights: dict[str, int] = {}
        if networkx.is_directed_acyclic_graph(self.graph):
            for node in reversed(list(networkx.topological_sort(self.graph))):
                heights[node] = max((1 + heights[child] for child in self.graph.successors(node)), default=0)
        return heights


def _distances_to(graph: networkx.DiGraph, nodes: Sequence[str]) -> dict[str, int]:
    """The number of edges to the nearest of these nodes, for each node that leads to one of them."""
    layers = networkx.bfs_layers(graph.reverse(copy=False), nodes)
    return {node: distance for distance, layer in enumerate(layers) for node in layer}


def classify(parsed: GraphQuestion, steps: Sequence[str], answered_right: bool, *, hidden: bool) -> Outcome:
    """The class of the path that these written steps form; without steps, of the answer.

    `hidden`: thoughts replaced the first steps. The path may then begin at any node that the root reaches, and is
    completed by a shortest path from the root to it. Without `hidden` it must begin at the root.
    In symbolic questions a step names only the node that its edge leads to. The edge to the first named node is
    then hidden or starts at the root; a path that names the root first is complete.
    """
    if not steps:
        return Outcome.correct_label if answered_right else Outcome.incorrect_label
    edges = prosqa.parse_path(list(steps), parsed.root, parsed.symbolic)
    if not edges:
        return Outcome.hallucination
    if parsed.symbolic and edges[0][1] == parsed.root:
        begin, before, edges = parsed.root, 0, edges[1:]
    elif hidden and parsed.symbolic:
        begin, edges = edges[0][1], edges[1:]
        before = _edges_from_root(parsed, begin)
    else:
        begin = edges[0][0]
        before = parsed.distance.get(begin) if hidden or begin == parsed.root else None
    connected = all(first[1] == second[0] for first, second in pairwise(edges))
    if before is None or not connected or not all(parsed.graph.has_edge(*edge) for edge in edges):
        return Outcome.hallucination
    if (edges[-1][1] if edges else begin) != parsed.target:
        return Outcome.wrong_target
    return Outcome.correct_path if before + len(edges) == parsed.hops else Outcome.longer_path


def _edges_from_root(parsed: GraphQuestion, node: str) -> int | None:
    """The length, at least one edge, of a shortest path from the root to a node; None if there is no path."""
    if node not in parsed.graph:
        return None
    lengths = [parsed.distance[parent] + 1 for parent in parsed.graph.predecessors(node) if parent in parsed.distance]
    return min(lengths, default=None)


class Redirection(NamedTuple):
    """A question changed so that the other option, and only it, is reachable.

    `swapped`: two edges exchanged their heads, which keeps the in-degree and out-degree of every node.
    `same_hops`: the shortest path to the new right option is as long as that to the old one.
    """

    question: str
    swapped: bool
    same_hops: bool


def redirect(parsed: GraphQuestion, random: Random) -> Redirection | None:
    """Redirect an edge of the path to the target towards the other option; None if no single change does this.

    An exchange of the heads of two edges is preferred, then a path of the same length. Among equally good changes one
    is chosen at random.
    """
    edges, cuts = parsed.edges, _cut_edges(parsed)
    towards_other = _distances_to(parsed.graph, [parsed.other])
    swaps: list[Changes] = [
        {i: (edges[i][0], head), j: (tail, edges[i][1])}
        for i in cuts
        for j, (tail, head) in enumerate(edges)
        if head in towards_other and tail not in parsed.distance
    ]
    heads = sorted({head for _, head in edges if head in towards_other})
    turns: list[Changes] = [{i: (edges[i][0], head)} for i in cuts for head in heads]
    acyclic = networkx.is_directed_acyclic_graph(parsed.graph)
    for swapped, candidates in ((True, swaps), (False, turns)):
        lengths = [(changes, _hops_to_other(parsed, changes, acyclic)) for changes in candidates]
        for same_hops in (True, False):
            fitting = [changes for changes, hops in lengths if hops is not None and (hops == parsed.hops) is same_hops]
            if fitting:
                text = prosqa.with_edges(parsed.text, _changed(edges, random.choice(fitting)))
                return Redirection(text, swapped, same_hops)
    return None


def remove_on_path(parsed: GraphQuestion, random: Random) -> str | None:
    """Remove an edge that is on all paths to the target, so that neither option is reachable; None if there is none.

    The last edge of the root is removed only if there is no other such edge: the root stays in the graph.
    """
    cuts = _cut_edges(parsed)
    edges_at_root = [i for i, edge in enumerate(parsed.edges) if parsed.root in edge]
    return _without_one_of([i for i in cuts if edges_at_root != [i]] or cuts, parsed, random)


def remove_elsewhere(parsed: GraphQuestion, random: Random) -> str | None:
    """Remove an edge that is on no path from the root to the target or to the other option; None if there is none."""
    towards_other = _distances_to(parsed.graph, [parsed.other])
    off_path = [i for i, edge in enumerate(parsed.edges) if edge[1] not in towards_other and not parsed.on_path(edge)]
    return _without_one_of(off_path, parsed, random)


def _without_one_of(indices: Sequence[int], parsed: GraphQuestion, random: Random) -> str | None:
    return prosqa.with_edges(parsed.text, _changed(parsed.edges, {random.choice(indices): None})) if indices else None


Changes = Mapping[int, prosqa.Edge | None]  # new edges, None to remove, by the index of an edge in the question


def _changed(edges: Sequence[prosqa.Edge], changes: Changes) -> list[prosqa.Edge | None]:
    return [changes.get(i, edge) for i, edge in enumerate(edges)]


def _cut_edges(parsed: GraphQuestion) -> list[int]:
    """The edges that are on all paths to the target; none if it is not reachable or if both options are."""
    if parsed.hops is None or parsed.other in parsed.distance:
        return []
    on_path = [i for i, edge in enumerate(parsed.edges) if parsed.on_path(edge)]
    return [i for i in on_path if parsed.target not in _distances_from(parsed.root, _changed(parsed.edges, {i: None}))]


def _hops_to_other(parsed: GraphQuestion, changes: Changes, acyclic: bool) -> int | None:
    """The distance of the other option after the changes; None if it is not the only reachable option.

    None, too, if the changes make a duplicate edge or a self-loop, or a cycle in an acyclic graph.
    """
    after = [edge for edge in _changed(parsed.edges, changes) if edge]
    reached = _distances_from(parsed.root, after)
    if parsed.target in reached or len(set(after)) < len(after) or any(tail == head for tail, head in after):
        return None
    if acyclic and not networkx.is_directed_acyclic_graph(networkx.DiGraph(after)):
        return None
    return reached.get(parsed.other)


def _distances_from(root: str, edges: Sequence[prosqa.Edge | None]) -> dict[str, int]:
    graph = networkx.DiGraph(edge for edge in edges if edge)
    graph.add_node(root)
    return dict(networkx.single_source_shortest_path_length(graph, root))
