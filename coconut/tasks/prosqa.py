"""ProsQA (Hao et al., arXiv 2412.06769): which of two nodes is reachable in a graph that is described in words?

Questions have one of two forms. In sentences: "Tom is a terpus. Every terpus is a brimpus. ... Is Tom a lempus or
scrompus?", answered "Tom is a lempus.". In symbols: "0 3 | 4 7 | ... ? 5 or 3 from 0", answered "5"; there a step is
the name of the next node.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import networkx

from coconut.tasks.chain import judge, key, tidy  # noqa: F401  (members of `Task`)
from coconut.tasks.hints import split_hint

name = "prosqa"
max_new_tokens = 128

Edge = tuple[str, str]

_SENTENCE = re.compile(r"(?:Every (\w+)|(\w+)) is an? (\w+)\.?")
_QUERY = re.compile(r"(.*?)\s*Is (\w+) an? (\w+) or (?:an? )?(\w+)\?")
_SYMBOLIC = re.compile(r"([^?]*)\? (\S+) or (\S+) from (\S+)")
_EDGE_SENTENCE = re.compile(r"(?:Every\s+)?(\w+)\s+is\s+an?\s+(\w+)(\s*\.?\s*)")
_EDGE_SYMBOLS = re.compile(r"([^\s|?]+)\s+([^\s|?]+)(\s*\|?\s*)")
_ASKED = re.compile(
    r"Is\s+(?P<root>\w+)\s+an?\s+(?P<first>\w+)\s+or\s+(?:an?\s+)?(?P<second>\w+)\s*\?\s*$"
    r"|\?\s*(?P<first_symbol>\S+)\s+or\s+(?P<second_symbol>\S+)\s+from\s+(?P<root_symbol>\S+)\s*$"
)


class Question(NamedTuple):
    edges: list[Edge]
    root: str
    options: tuple[str, str]  # the two nodes asked about, in the order of the text
    symbolic: bool


def parse_question(question: str) -> Question:
    """Parse a question, without its hint. Raises ValueError if the text has neither form."""
    text = tidy(split_hint(question)[1])
    if found := _SYMBOLIC.fullmatch(text):
        pairs = [pair.split() for pair in found[1].split("|")]
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(f"{' '.join(pair)!r} is not an edge; it takes two names: 'a b | c d'.")
        return Question([(a, b) for a, b in pairs], found[4], (found[2], found[3]), symbolic=True)
    if found := _QUERY.fullmatch(text):
        edges = _edges(found[1])
        if edges is None:
            raise ValueError(f"Not every sentence has the form 'X is a Y.' or 'Every Y is a Z.': {_shorten(found[1])}")
        return Question(edges, found[2], (found[3], found[4]), symbolic=False)
    raise ValueError(
        "The question ends neither in 'Is X a Y or Z?' nor in '? Y or Z from X': " + _shorten(text, end=True)
    )


def graph(question: str) -> networkx.DiGraph:
    """The graph that a question describes, with names as nodes.

    Its attribute `graph` holds "root" and "options", the two nodes asked about.
    """
    parsed = parse_question(question)
    digraph = networkx.DiGraph(root=parsed.root, options=parsed.options)
    digraph.add_edges_from(parsed.edges)
    digraph.add_nodes_from([parsed.root, *parsed.options])
    return digraph


def with_edges(question: str, edges: Sequence[Edge | None]) -> str:
    """Replace the edges of a question, one for one; None removes an edge.

    The rest of the text is unchanged: order, spaces, and what is asked. Raises ValueError if the number of edges is
    not the question's, or if none is left.
    """
    parsed = parse_question(question)
    if len(edges) != len(parsed.edges) or not any(edges):
        raise ValueError(f"The question has {len(parsed.edges)} edges, but {len(edges)} were given: {edges}.")
    found = _edge_matches(question, parsed)
    parts = []
    for match, edge in zip(found, edges, strict=True):
        if edge is not None:
            (tail, tail_end), (head, head_end) = match.span(1), match.span(2)
            between = question[tail_end:head]
            parts += [question[match.start() : tail], edge[0], between, edge[1], question[head_end : match.start(3)]]
            parts.append(match[3])
    parts[-1] = found[-1][3]
    changed = question[: found[0].start()] + "".join(parts) + question[found[-1].end() :]
    assert parse_question(changed).edges == [edge for edge in edges if edge]
    return changed


def told_edges(question: str) -> list[str]:
    """The text that tells each edge: "0 3", "Every cat is a dog"."""
    return [question[m.start() : m.start(3)] for m in _edge_matches(question, parse_question(question))]


def retell(question: str, told: Sequence[str]) -> str:
    """Replace the texts that tell the edges; there may be more of them. The rest of the question is unchanged."""
    parsed = parse_question(question)
    found = _edge_matches(question, parsed)
    ends = [m[3] for m in found]
    usual = ends[0] if len(ends) > 1 else " | " if parsed.symbolic else ". "
    between = [*ends[:-1], *[usual] * len(told)][: len(told) - 1]
    edges = "".join(text + end for text, end in zip(told, [*between, ends[-1]], strict=True))
    return question[: found[0].start()] + edges + question[found[-1].end() :]


def tell(edge: Edge, symbolic: bool, has_parents: bool) -> str:
    """The text that tells an edge. `has_parents`: of the node where it starts; in sentences others are persons."""
    return " ".join(edge) if symbolic else f"{'Every ' * has_parents}{edge[0]} is a {edge[1]}"


def with_query(question: str, root: str, options: tuple[str, str]) -> str:
    """Replace the names in what is asked, "Is Tom a lempus or scrompus?" or "? 5 or 3 from 0"."""
    found = _ASKED.search(question)
    assert found, f"parse_question accepts what has another query: {question!r}"
    names = {"root": root, "first": options[0], "second": options[1]}
    places = sorted((found.span(group), names[group.removesuffix("_symbol")]) for group in found.groupdict()
                    if found[group] is not None)  # fmt: skip
    for (start, end), name in reversed(places):
        question = question[:start] + name + question[end:]
    return question


def _edge_matches(question: str, parsed: Question) -> list[re.Match[str]]:
    """Where each edge is told: groups 1 and 2 are its nodes, group 3 is what separates it from the next edge."""
    begin = len(question) - len(split_hint(question)[1])
    pattern = _EDGE_SYMBOLS if parsed.symbolic else _EDGE_SENTENCE
    return list(pattern.finditer(question, begin))[: len(parsed.edges)]


def parse_path(steps: list[str], root: str | None = None, symbolic: bool | None = None) -> list[Edge] | None:
    """The edges that the steps of a chain name, in their order; None if a step does not have the expected form.

    The edges are not checked against the graph. A chain in symbols does not name its root: without `root` the edge to
    the first step is missing. `symbolic` chooses the form; by default it is inferred from the steps.
    """
    sentences = [_edges(step) for step in steps]
    if not symbolic and all(edges for edges in sentences):
        return [edge for edges in sentences for edge in edges or []]
    if symbolic is False:
        return None
    names = [key(step) for step in steps]
    if any(len(name.split()) != 1 for name in names):
        return None
    if root is not None:
        names = [root, *names]
    return list(pairwise(names))


def read_target(answer: str) -> str | None:
    """The node that an answer names: "Tom is a lempus." -> "lempus", "5" -> "5"."""
    text = key(answer)
    if found := _SENTENCE.fullmatch(text):
        return found[3]
    return text if len(text.split()) == 1 else None


def candidates(question: str) -> list[str] | None:
    try:
        parsed = parse_question(question)
    except ValueError:
        return None
    if parsed.symbolic:
        return list(parsed.options)
    return [f"{parsed.root} is a {option}." for option in parsed.options]


def _edges(text: str) -> list[Edge] | None:
    """The edges of a text of sentences such as "Every X is a Y."; None if it contains anything else."""
    text, edges, position = tidy(text), [], 0
    while position < len(text):
        found = _SENTENCE.match(text, position)
        if not found:
            return None
        edges.append((found[1] or found[2], found[3]))
        position = found.end() + 1
    return edges


def _shorten(text: str, end: bool = False, limit: int = 80) -> str:
    if len(text) <= limit:
        return repr(text)
    return repr("..." + text[-limit:] if end else text[:limit] + "...")
