"""What a task offers to look for shortcuts: changes of a question's text, shallow rules, harder questions.

Everything here works on texts and needs no model. `OFFERS` has an entry for each task that offers something; a new task
gets one by writing the functions that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, NamedTuple

import networkx

from coconut.runs.study import NotApplicable
from coconut.tasks import pointers, prosqa

DENSER = 0.5  # how many edges are added, as a share of those that are there
LARGER = 0.2  # how many nodes are added, as a share


class Edited(NamedTuple):
    """A changed question with its right answer. `names`: the new name of each node, if they have new ones."""

    question: str
    answer: str
    names: Mapping[str, str] = {}


class Hints(NamedTuple):
    """The name of the right answer, the name of a wrong one, and that wrong answer as a model would write it."""

    right: str
    wrong: str
    wrong_answer: str


Names = dict[str, str]  # of the nodes of a question, each with its kind; a name may only replace another of its kind
Pool = Mapping[str, Sequence[str]]  # all names that are in use, by kind


@dataclass(frozen=True)
class Edit:
    """A change that keeps the truth, up to names. `change` gives None if the question cannot be changed so.

    `usual`: whether a changed question is as likely in the data as the one before.
    """

    label: str
    change: Callable[[str, str, Random, Pool], Edited | None]  # of a question and its answer
    usual: bool = True


@dataclass(frozen=True)
class Rule:
    """A way to answer without reasoning. `answer` gives None where the rule does not say.

    `undecided`: name and label of the questions for which it does not say, if they are a set of interest.
    """

    label: str
    answer: Callable[[str], str | None]
    undecided: tuple[str, str] | None = None


@dataclass(frozen=True)
class Offer:
    """What one task offers. A part that a task lacks is absent.

    names: those of a question's nodes.
    longer: the keys for the task's data builder that make chains of this length, given the keys of the data trained on.
    larger: likewise for more nodes, with a label. Both raise NotApplicable if there are none.
    """

    edits: Mapping[str, Edit]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    names: Callable[[str], Names] | None = None
    hints: Callable[[str, str, Random], Hints] | None = None
    longer: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    larger: Callable[[dict[str, Any]], tuple[dict[str, Any], str]] | None = None


def builder_keys(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `coconut data NAME` that made a data set, by its manifest. Raises NotApplicable if there are none."""
    if "dials" not in manifest:
        raise NotApplicable("the training data were read from files, so there are no settings to make others by")
    keys = {key: value for key, value in manifest["dials"].items() if value is not None}
    if keys.get("form") == "symbols":
        keys.pop("names", None)  # is for sentences
    if "edges" in keys:
        keys.pop("branching", None)  # edges is given in its place
    return {**({"preset": manifest["preset"]} if "preset" in manifest else {}), **keys}


def _new_names(names: Names, random: Random, pool: Pool) -> dict[str, str]:
    """A new name for each node: a random injection into the names of its kind."""
    kinds = {kind: [name for name, its in names.items() if its == kind] for kind in dict.fromkeys(names.values())}
    return {name: new for kind, own in kinds.items()
            for name, new in zip(own, random.sample(sorted(pool[kind]), len(own)), strict=True)}  # fmt: skip


# --- graphs ---------------------------------------------------------------------------------------


def _graph_names(question: str) -> Names:
    parsed = prosqa.parse_question(question)
    heads = {head for _, head in parsed.edges} | {*parsed.options}
    kind = {True: "node"} if parsed.symbolic else {True: "concept", False: "person"}
    nodes = dict.fromkeys([*(node for edge in parsed.edges for node in edge), parsed.root, *parsed.options])
    return {node: kind.get(node in heads, "node") for node in nodes}


def _answer_of(question: str, target: str) -> str:
    """The answer that names this option."""
    answers = prosqa.candidates(question)
    assert answers
    return answers[prosqa.parse_question(question).options.index(target)]


def _options_exchanged(question: str, answer: str, random: Random, pool: Pool) -> Edited:
    parsed = prosqa.parse_question(question)
    first, second = parsed.options
    return Edited(prosqa.with_query(question, parsed.root, (second, first)), answer)


def _edges_shuffled(question: str, answer: str, random: Random, pool: Pool) -> Edited | None:
    told = prosqa.told_edges(question)
    shuffled = random.sample(told, len(told))
    return None if shuffled == told else Edited(prosqa.retell(question, shuffled), answer)


def _nodes_renamed(question: str, answer: str, random: Random, pool: Pool) -> Edited | None:
    parsed, target = prosqa.parse_question(question), prosqa.read_target(answer)
    new = _new_names(_graph_names(question), random, pool)
    if len({*new.values()}) < len(new):  # a name of two kinds
        return None
    text = prosqa.with_edges(question, [(new[a], new[b]) for a, b in parsed.edges])
    first, second = parsed.options
    text = prosqa.with_query(text, new[parsed.root], (new[first], new[second]))
    return Edited(text, _answer_of(text, new[target or ""]), new)


def _edges_added(question: str, answer: str, random: Random, pool: Pool) -> Edited | None:
    """Add edges between nodes that are no options, acyclic, so that every distance that the question is about stays.

    What the root reaches of the two options, and how far the right one is from it, is as before. No edge leads to a
    node without parents or to an option, so that their numbers of edges stay.
    """
    parsed, target = prosqa.parse_question(question), prosqa.read_target(answer) or ""
    (other,) = {*parsed.options} - {target}
    graph = prosqa.graph(question)
    if not networkx.is_directed_acyclic_graph(graph) or not networkx.has_path(graph, parsed.root, target):
        return None
    order = list(networkx.lexicographical_topological_sort(graph, key=lambda _: random.random()))
    heads = {node for node in order if graph.in_degree(node) and node not in parsed.options}
    tails = [(place, node) for place, node in enumerate(order) if node not in parsed.options]
    pairs = [(tail, head) for place, tail in tails for head in order[place + 1 :] if head in heads]
    told, wanted = prosqa.told_edges(question), round(DENSER * len(parsed.edges))
    new: list[prosqa.Edge] = []
    measured = None
    for tail, head in random.sample(pairs, len(pairs)):
        if len(new) == wanted:
            break
        measured = measured or _distances(graph, parsed.root, target, other)
        from_root, to_target, to_other, hops = measured
        shorter = tail in from_root and head in to_target and from_root[tail] + 1 + to_target[head] < hops
        if graph.has_edge(tail, head) or shorter or (tail in from_root and head in to_other):
            continue
        graph.add_edge(tail, head)
        new.append((tail, head))
        measured = None
    if not new:
        return None
    for edge in new:
        text = prosqa.tell(edge, parsed.symbolic, bool(graph.in_degree(edge[0])))
        told.insert(random.randrange(len(told) + 1), text)
    return Edited(prosqa.retell(question, told), answer)


def _distances(
    graph: networkx.DiGraph, root: str, target: str, other: str
) -> tuple[dict[str, int], dict[str, int], dict[str, int], int]:
    """Edges from the root to each node, from each node to the target and to the other option, and root to target."""
    backwards = graph.reverse(copy=False)
    lengths = networkx.single_source_shortest_path_length
    from_root = dict(lengths(graph, root))
    return from_root, dict(lengths(backwards, target)), dict(lengths(backwards, other)), from_root[target]


def _larger_option(measure: Callable[[prosqa.Question, str], float], question: str) -> str | None:
    """The answer that names the option with the larger measure; None if both have the same."""
    parsed = prosqa.parse_question(question)
    first, second = (measure(parsed, option) for option in parsed.options)
    return None if first == second else _answer_of(question, parsed.options[second > first])


def _depth(parsed: prosqa.Question, option: str) -> int:
    """Edges to a node from the farthest one without parents that leads to it."""
    parents: dict[str, list[str]] = {}
    for tail, head in parsed.edges:
        parents.setdefault(head, []).append(tail)
    front, seen, distance, depth = {option}, {option}, 0, 0
    while front:
        if any(node not in parents for node in front):
            depth = distance
        front = {parent for node in front for parent in parents.get(node, ())} - seen
        seen |= front
        distance += 1
    return depth


def _place_named(parsed: prosqa.Question, option: str) -> int:
    return parsed.options.index(option)


def _edges_in(parsed: prosqa.Question, option: str) -> int:
    return sum(head == option for _, head in parsed.edges)


def _last_told(parsed: prosqa.Question, option: str) -> int:
    return max((place for place, edge in enumerate(parsed.edges) if option in edge), default=-1)


def _graph_hints(question: str, answer: str, random: Random) -> Hints:
    target = prosqa.read_target(answer) or ""
    (other,) = {*prosqa.parse_question(question).options} - {target}
    return Hints(target, other, _answer_of(question, other))


def _longer_graphs(keys: dict[str, Any], hops: int) -> dict[str, Any]:
    if keys["preset"] != "graphs":
        return {**keys, "hops_from": hops, "hops_to": hops, "plant": True}
    least = max(1, keys["hops_from"] + keys["hops_to"] - hops)  # as many nodes outside the two chains, if possible
    if keys["nodes"] < least + hops + 3:
        raise NotApplicable(f"graphs of {keys['nodes']} nodes have no room for chains of {hops}")
    return {**keys, "hops_from": least, "hops_to": hops}


def _larger_graphs(keys: dict[str, Any]) -> tuple[dict[str, Any], str]:
    nodes = _more(keys["nodes"])
    edges = {"edges": round(keys["edges"] * nodes / keys["nodes"])} if "edges" in keys else {}
    return {**keys, "nodes": nodes, **edges}, f"graphs drawn from {nodes} nodes instead of {keys['nodes']}"


def _more(nodes: int) -> int:
    return nodes + max(1, round(LARGER * nodes))


# --- pointers -------------------------------------------------------------------------------------


def _pointer_names(question: str) -> Names:
    parsed = pointers.parse_question(question)
    return dict.fromkeys([*parsed.pointers, *parsed.pointers.values(), parsed.start], "node")


def _entries_shuffled(question: str, answer: str, random: Random, pool: Pool) -> Edited | None:
    parsed = pointers.parse_question(question)
    entries = list(parsed.pointers.items())
    shuffled = random.sample(entries, len(entries))
    return None if shuffled == entries else _pointers_told(parsed._replace(pointers=dict(shuffled)), answer)


def _pointers_renamed(question: str, answer: str, random: Random, pool: Pool) -> Edited:
    parsed = pointers.parse_question(question)
    new = _new_names(_pointer_names(question), random, pool)
    table = {new[a]: new[b] for a, b in parsed.pointers.items()}
    return Edited(pointers.write_question(pointers.Question(table, parsed.hops, new[parsed.start])), new[answer], new)


def _pointers_told(parsed: pointers.Question, answer: str) -> Edited:
    return Edited(pointers.write_question(parsed), answer)


def _entry(place: int, question: str) -> str:
    return list(pointers.parse_question(question).pointers.values())[place]


def _pointer_hints(question: str, answer: str, random: Random) -> Hints:
    wrong = random.choice(sorted({*pointers.parse_question(question).pointers.values()} - {answer}))
    return Hints(answer, wrong, wrong)


def _longer_pointers(keys: dict[str, Any], hops: int) -> dict[str, Any]:
    if hops >= keys["nodes"]:
        raise NotApplicable(f"of {keys['nodes']} nodes there are at most {keys['nodes'] - 1} hops without a repetition")
    return {**keys, "hops_from": hops, "hops_to": hops}


def _larger_pointers(keys: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if (nodes := min(_more(keys["nodes"]), 26)) == keys["nodes"]:
        raise NotApplicable("there are no more than 26 letters to name nodes by")
    return {**keys, "nodes": nodes}, f"tables of {nodes} entries instead of {keys['nodes']}"


# --- ontologies -----------------------------------------------------------------------------------


def _sentences_shuffled(question: str, answer: str, random: Random, pool: Pool) -> Edited | None:
    told, mark, query = question.partition(" True or false: ")
    sentences = told.removesuffix(".").split(". ")
    shuffled = random.sample(sentences, len(sentences))
    return Edited(". ".join(shuffled) + f".{mark}{query}", answer) if mark and shuffled != sentences else None


def _longer_ontologies(keys: dict[str, Any], hops: int) -> dict[str, Any]:
    return {**keys, "hops_from": hops, "hops_to": hops}


OFFERS: Mapping[str, Offer] = {
    "prosqa": Offer(
        edits={
            "option_order": Edit("the options exchanged", _options_exchanged),
            "edge_order": Edit("the edges in another order", _edges_shuffled),
            "new_names": Edit("other names for the nodes", _nodes_renamed),
            "denser": Edit("graphs with half as many edges more", _edges_added, usual=False),
        },
        rules={
            "named_last": Rule("the option named last", partial(_larger_option, _place_named)),
            "deeper": Rule("the deeper option", partial(_larger_option, _depth),
                           ("equal_depth", "options equally deep")),
            "more_edges": Rule("the option with more edges", partial(_larger_option, _edges_in)),
            "last_edge": Rule("the option nearer the end of the edges", partial(_larger_option, _last_told)),
        },
        names=_graph_names, hints=_graph_hints, longer=_longer_graphs, larger=_larger_graphs,
    ),
    "pointers": Offer(
        edits={
            "edge_order": Edit("the table in another order", _entries_shuffled),
            "new_names": Edit("other names for the nodes", _pointers_renamed),
        },
        rules={
            "last_entry": Rule("the end of the last entry", partial(_entry, -1)),
            "first_entry": Rule("the end of the first entry", partial(_entry, 0)),
        },
        names=_pointer_names, hints=_pointer_hints, longer=_longer_pointers, larger=_larger_pointers,
    ),
    "prontoqa": Offer(
        edits={"edge_order": Edit("the sentences in another order", _sentences_shuffled)},
        longer=_longer_ontologies,
    ),
}  # fmt: skip
