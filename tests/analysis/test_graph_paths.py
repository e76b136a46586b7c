"""Graphs of questions: what lies where, which kind of path was written, and edges that are changed."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from random import Random
from typing import Any

import networkx
import pytest
from helpers import DATA
from helpers.runs import graph_rows
from hypothesis import given
from hypothesis import strategies as st

from coconut.analysis.graph_paths import GraphQuestion, Outcome, classify, redirect, remove_elsewhere, remove_on_path
from coconut.tasks import prosqa

# a -> b -> t and a -> c -> d -> t; a -> e; a side way x -> d; the other option y is reached from x alone
SYMBOLS = GraphQuestion.read("a b | b t | a c | c d | d t | a e | x d | x y ? t or y from a", "t")
SENTENCES = GraphQuestion.read(
    "Ann is a b. Every b is a t. Ann is a c. Every c is a d. Every d is a t. Ann is a e. Xul is a d. Xul is a y. "
    "Is Ann a y or t?",
    "Ann is a t.",
)
RELEASED = json.loads((DATA / "prosqa_released.json").read_text())


def told(nodes: str) -> list[str]:
    """The steps that tell a way in sentences: "abt" -> Ann is a b., Every b is a t."""
    return [f"{'Ann' if one == 'a' else 'Every ' + one} is a {other}." for one, other in pairwise(nodes)]


WHOLE = {Outcome.correct_path: "abt", Outcome.longer_path: "acdt", Outcome.hallucination: "abe abd ay abt?",
         Outcome.wrong_target: "ab acd"}  # fmt: skip
PARTIAL = {Outcome.correct_path: "bt t", Outcome.longer_path: "dt cdt", Outcome.wrong_target: "cd e",
           Outcome.hallucination: "y xd xdt be ? at"}  # fmt: skip


def listed(table: dict[Outcome, str]) -> list[tuple[str, Outcome]]:
    return [(nodes, outcome) for outcome, written in table.items() for nodes in written.split()]


@pytest.mark.parametrize(("nodes", "expected"), listed(WHOLE))
def test_classes_of_whole_paths(nodes: str, expected: Outcome) -> None:
    for right in (True, False):
        assert classify(SYMBOLS, list(nodes[1:]), right, hidden=False) is expected
        assert classify(SENTENCES, told(nodes), right, hidden=False) is expected


@pytest.mark.parametrize(("nodes", "expected"), listed(PARTIAL))
def test_a_partial_path_is_completed(nodes: str, expected: Outcome) -> None:
    assert classify(SYMBOLS, list(nodes), True, hidden=True) is expected
    if len(nodes) > 1:
        assert classify(SENTENCES, told(nodes), True, hidden=True) is expected


def test_a_whole_path_begins_at_the_root_and_may_follow_thoughts() -> None:
    assert classify(SYMBOLS, ["t"], True, hidden=False) is Outcome.hallucination
    assert classify(SENTENCES, told("bt"), True, hidden=False) is Outcome.hallucination
    assert classify(SENTENCES, told("abt"), True, hidden=True) is Outcome.correct_path
    in_symbols = {Outcome.correct_path: "abt", Outcome.longer_path: "acdt", Outcome.wrong_target: "ac a",
                  Outcome.hallucination: "at"}  # fmt: skip
    for nodes, expected in listed(in_symbols):  # with the root itself
        for hidden in (True, False):
            assert classify(SYMBOLS, list(nodes), True, hidden=hidden) is expected


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("asked", [SYMBOLS, SENTENCES])
def test_without_steps_the_label_counts(asked: GraphQuestion, hidden: bool) -> None:
    assert classify(asked, [], True, hidden=hidden) is Outcome.correct_label
    assert classify(asked, [], False, hidden=hidden) is Outcome.incorrect_label


@pytest.mark.parametrize("hidden", [True, False])
def test_disconnected_edges_and_steps_of_another_form_are_hallucinations(hidden: bool) -> None:
    gap = ["Ann is a b.", "Every c is a d.", "Every d is a t."]
    for steps in (gap, ["Ann is", "Every b is a t."], ["b", "t"], ["b"], ["Ann is a b.", "t"]):
        assert classify(SENTENCES, steps, True, hidden=hidden) is Outcome.hallucination
    for steps in (["a b", "t"], told("abt"), ["b", "###t 4"]):
        assert classify(SYMBOLS, steps, True, hidden=hidden) is Outcome.hallucination


def by_enumeration(asked: GraphQuestion, written: list[str], hidden: bool) -> Outcome:
    """The class whose definition fits the written nodes (a chain in symbols), from the list of all paths."""
    graph, root = asked.graph, asked.root
    if written[0] == root:
        if len(written) == 1:
            return Outcome.wrong_target
        written, hidden = written[1:], False
    shortest = [path[1:] for path in networkx.all_shortest_paths(graph, root, asked.target)]
    every = [path[1:] for node in graph if node != root for path in networkx.all_simple_paths(graph, root, node)]
    paths = [path for path in every if (path[-len(written) :] if hidden else path) == written]
    if not paths:
        return Outcome.hallucination
    if written[-1] != asked.target:
        return Outcome.wrong_target
    return Outcome.correct_path if any(path in shortest for path in paths) else Outcome.longer_path


QUESTIONS = [GraphQuestion.read(row["question"], row["answer"]) for row in graph_rows(seed=3, count=30)]


@given(st.sampled_from(QUESTIONS), st.randoms(use_true_random=False), st.booleans())
def test_every_walk_has_the_class_of_its_definition(asked: GraphQuestion, chance: random.Random, hidden: bool) -> None:
    nodes = sorted(asked.graph)
    walk = [chance.choice(nodes) if hidden and chance.random() < 0.5 else asked.root]
    for _ in range(chance.randint(1, 4)):
        further = sorted(asked.graph.successors(walk[-1]))
        walk.append(chance.choice(further or nodes))
        if chance.random() < 0.1:
            walk[-1] = chance.choice([*nodes, "strange"])
        if walk[-1] == "strange":
            break
    written = walk[1:]
    assert classify(asked, written, True, hidden=hidden) is by_enumeration(asked, written, hidden)


def test_gold_chains_are_correct_paths() -> None:
    for row in [*RELEASED, *graph_rows(seed=4, count=20)]:
        asked = GraphQuestion.read(row["question"], row["answer"])
        for thought in range(len(row["steps"])):
            assert classify(asked, row["steps"][thought:], True, hidden=thought > 0) is Outcome.correct_path


def test_questions_are_read_with_distances_and_heights() -> None:
    assert SYMBOLS.distance == {"a": 0, "b": 1, "c": 1, "e": 1, "t": 2, "d": 2}
    assert SYMBOLS.remaining == {"t": 0, "b": 1, "d": 1, "a": 2, "c": 2, "x": 2}
    assert SYMBOLS.hops == 2
    assert [node for node in SYMBOLS.graph if SYMBOLS.on_shortest_path(node)] == ["a", "b", "t"]
    assert SYMBOLS.shortest_heights == {"t": 0, "e": 0, "y": 0, "b": 1, "d": 1, "a": 1, "x": 1, "c": 2}
    assert SYMBOLS.longest_heights == {"t": 0, "e": 0, "y": 0, "b": 1, "d": 1, "x": 2, "c": 2, "a": 3}
    asked = GraphQuestion.read("a b | b a | b t | x y ? t or y from a", "t")
    assert asked.longest_heights == {}, "there is a cycle"
    assert asked.shortest_heights == {"t": 0, "y": 0, "b": 1, "x": 1, "a": 2}
    with pytest.raises(ValueError, match="'b' is none of the two options, t and y"):
        GraphQuestion.read("a b | b t | x y ? t or y from a", "b")


GRAPHS = [GraphQuestion.read(row["question"], row["answer"])
          for row in [*RELEASED, *graph_rows(seed=5, count=60, nodes=10)]]  # fmt: skip


def reachable(question: str) -> set[str]:
    graph = prosqa.graph(question)
    return networkx.descendants(graph, graph.graph["root"]) & set(graph.graph["options"])


def degrees(question: str) -> dict[str, tuple[int, int]]:
    graph = prosqa.graph(question)
    return {node: (graph.in_degree(node), graph.out_degree(node)) for node in graph}


def test_after_a_redirection_exactly_the_other_option_is_reachable() -> None:
    swapped = 0
    for number, asked in enumerate(GRAPHS):
        if found := redirect(asked, Random(number)):
            after = prosqa.graph(found.question)
            assert reachable(asked.text) == {asked.target}
            assert reachable(found.question) == {asked.other}
            assert networkx.is_directed_acyclic_graph(after)
            hops = networkx.shortest_path_length(after, asked.root, asked.other)
            assert found.same_hops == (hops == asked.hops)
            before, edges = prosqa.parse_question(asked.text), prosqa.parse_question(found.question).edges
            differing = [pair for pair in zip(before.edges, edges, strict=True) if pair[0] != pair[1]]
            assert len(differing) == 1 + found.swapped
            assert (degrees(asked.text) == degrees(found.question)) == found.swapped
            assert all(old[0] == new[0] for old, new in differing)
            assert prosqa.with_edges(found.question, before.edges) == asked.text
            swapped += found.swapped
    assert swapped > 40


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ("a t | x y | x t", ("a y | x y | x t ? t or y from a", False, True)),  # a swap would tell x t twice
        ("a t | x z", None),  # no edge leads to y, so none can be turned to it
        ("a t | a b | b y", None),  # both are reachable
        ("a b | b t | a c | c t | x y", None),  # two ways that share no edge
    ],
)
def test_redirect_turns_one_edge_if_no_two_can_be_swapped(edges: str, expected: Any) -> None:
    assert redirect(GraphQuestion.read(f"{edges} ? t or y from a", "t"), Random(0)) == expected


def test_remove_on_path_disconnects_both_options() -> None:
    for number, asked in enumerate(GRAPHS):
        found = remove_on_path(asked, Random(number))
        ways = list(networkx.edge_disjoint_paths(asked.graph, asked.root, asked.target))
        assert (found is None) == (len(ways) > 1)
        if found:
            assert reachable(found) == set()
            assert len(prosqa.parse_question(found).edges) == len(prosqa.parse_question(asked.text).edges) - 1


def test_remove_elsewhere_keeps_all_paths_to_the_options() -> None:
    def ways(question: str, asked: GraphQuestion) -> tuple[list[list[str]], set[str]]:
        graph = prosqa.graph(question)
        return list(networkx.all_simple_paths(graph, asked.root, asked.target)), networkx.ancestors(graph, asked.other)

    removed = 0
    for number, asked in enumerate(GRAPHS):
        if found := remove_elsewhere(asked, Random(number)):
            assert ways(found, asked) == ways(asked.text, asked)
            assert len(prosqa.parse_question(found).edges) == len(prosqa.parse_question(asked.text).edges) - 1
            removed += 1
    assert removed > 40


@pytest.mark.parametrize(
    ("question", "edges", "expected"),
    [
        ("0 3 | 3 4 | 7 6 ? 4 or 6 from 0", [("0", "6"), ("3", "4"), None], "0 6 | 3 4 ? 4 or 6 from 0"),
        ("0 3|3 4|7 6 ? 4 or 6 from 0\n", [None, ("3", "4"), ("7", "12")], "3 4|7 12 ? 4 or 6 from 0\n"),
        ("Tom is a cat. Every cat is an owl . Bob is a dog.  Is Tom a owl or dog?",
         [("Tom", "dog"), ("cat", "owl"), None], "Tom is a dog. Every cat is an owl.  Is Tom a owl or dog?"),
    ],
)  # fmt: skip
def test_edges_are_replaced_in_the_text(question: str, edges: list[tuple[str, str] | None], expected: str) -> None:
    assert prosqa.with_edges(question, edges) == expected
    own = prosqa.parse_question(question).edges
    assert prosqa.with_edges(question, own) == question
    with pytest.raises(ValueError, match="has 3 edges, but 2 were given"):
        prosqa.with_edges(question, own[:2])
