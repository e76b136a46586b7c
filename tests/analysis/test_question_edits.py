"""Changes of questions that keep the truth, shallow rules, and hints."""

from __future__ import annotations

import re
from random import Random

import networkx
import pytest
from helpers.models import SENTENCES
from helpers.runs import graph_rows

from coconut.analysis.question_edits import OFFERS, Edited, builder_keys
from coconut.runs.study import NotApplicable
from coconut.tasks import TASKS, pointers, prosqa
from coconut.tasks.hints import split_hint, with_hint
from data_builders.pointers import draw_row as draw_pointers
from data_builders.prontoqa import ProntoqaBuild, drawn
from data_builders.prosqa import Form
from data_builders.prover import check

GRAPHS = [(row["question"], row["answer"])
          for form in (Form.symbols, Form.sentences) for row in graph_rows(3, 25, nodes=10, form=form)]  # fmt: skip
TABLES = [(row[0]["question"], row[0]["answer"]) for seed in range(25)
          if (row := draw_pointers(Random(seed), lambda key: True, 8, 1, 5, 1.0))]  # fmt: skip


def edited(task: str, name: str, questions: list[tuple[str, str]]) -> list[tuple[str, str, Edited]]:
    """The question, its answer, and the changed ones."""
    offer = OFFERS[task]
    found = []
    for asked in questions:
        pool: dict[str, list[str]] = {}
        if offer.names:
            same_form = [q for q, _ in questions if ("Every" in q) == ("Every" in asked[0])]
            for question in same_form:
                for node, kind in offer.names(question).items():
                    pool.setdefault(kind, []).append(node)
        change = offer.edits[name].change(*asked, Random(asked[0]), {k: sorted(set(v)) for k, v in pool.items()})
        if change:
            found.append((*asked, change))
    assert len(found) >= len(questions) // 2
    return found


def is_right(question: str, answer: str) -> bool:
    """Whether the answer is right, by the graph alone, and the other option wrong."""
    parsed, target = prosqa.parse_question(question), prosqa.read_target(answer)
    reached = networkx.descendants(networkx.DiGraph(parsed.edges), parsed.root)
    return {option for option in parsed.options if option in reached} == {target}


@pytest.mark.parametrize("name", list(OFFERS["prosqa"].edits))
def test_a_changed_graph_keeps_its_right_answer(name: str) -> None:
    for question, answer, change in edited("prosqa", name, GRAPHS):
        assert change.question != question
        assert is_right(change.question, change.answer)
        before, after = prosqa.parse_question(question), prosqa.parse_question(change.question)
        if name == "option_order":
            assert after == before._replace(options=before.options[::-1])
        elif name == "edge_order":
            assert sorted(after.edges) == sorted(before.edges)
            assert after.edges != before.edges
        elif name == "new_names":
            assert after.edges == [(change.names[a], change.names[b]) for a, b in before.edges]
            assert after.options == tuple(change.names[option] for option in before.options)
            assert len({*change.names.values()}) == len(change.names)
        if name in ("edge_order", "option_order"):
            assert change.answer == answer
            words = [sorted(re.findall(r"\S", text)) for text in (question, change.question)]
            assert words[0] == words[1], "only the order differs"


def test_persons_are_renamed_to_persons_and_concepts_to_concepts() -> None:
    for question, _, change in edited("prosqa", "new_names", GRAPHS[25:]):
        assert all(old[0].isupper() == new[0].isupper() for old, new in change.names.items())
        assert question.count("Every") == change.question.count("Every")


def test_added_edges_leave_every_distance_that_the_question_is_about() -> None:
    added = []
    for question, answer, change in edited("prosqa", "denser", GRAPHS):
        before, after = prosqa.graph(question), prosqa.graph(change.question)
        assert {*before.edges} < {*after.edges}
        assert networkx.is_directed_acyclic_graph(after)
        root, target = before.graph["root"], prosqa.read_target(answer)
        assert networkx.shortest_path_length(after, root, target) == networkx.shortest_path_length(before, root, target)
        for node in before:
            if node in before.graph["options"]:
                assert {*after.in_edges(node), *after.out_edges(node)} == {
                    *before.in_edges(node),
                    *before.out_edges(node),
                }
            assert bool(before.in_degree(node)) == bool(after.in_degree(node))
        if "Every" in question:
            told = [text for text in prosqa.told_edges(change.question) if not text.startswith("Every")]
            assert {text.split()[0] for text in told} <= {node for node in after if not after.in_degree(node)}
        added.append(len(after.edges) / len(before.edges))
    assert 1.3 < sum(added) / len(added) <= 1.6


@pytest.mark.parametrize("name", list(OFFERS["pointers"].edits))
def test_a_changed_table_keeps_its_right_answer(name: str) -> None:
    for question, answer, change in edited("pointers", name, TABLES):
        before, after = pointers.parse_question(question), pointers.parse_question(change.question)
        assert pointers.walk(after)[-1] == change.answer
        assert after.hops == before.hops
        if name == "edge_order":
            assert (after, change.answer) == (before, answer)
            assert list(after.pointers) != list(before.pointers)
        else:
            assert change.answer == change.names[answer]
            assert after.start == change.names[before.start]


def test_sentences_of_an_ontology_in_another_order_still_prove_the_answer() -> None:
    rows = [found[0] for seed in range(5) if (found := drawn(Random(seed), lambda key: True, ProntoqaBuild().dials()))]
    found = edited("prontoqa", "edge_order", [(row["question"], row["answer"]) for row in rows])
    for row, (_, answer, change) in zip(rows, found, strict=True):
        check({**row, "question": change.question, "answer": answer})


def test_rules_say_what_they_are_called() -> None:
    question = "0 3 | 3 5 | 1 4 | 2 5 | 4 6 | 6 7 ? 5 or 7 from 0"
    rules = OFFERS["prosqa"].rules
    assert {name: rule.answer(question) for name, rule in rules.items()} == {
        "named_last": "7",
        "deeper": "7",  # three edges from 1; 5 is two from 0 and one from 2
        "more_edges": "5",
        "last_edge": "7",
    }
    assert rules["named_last"].answer(SENTENCES[0].question) == "Tom is a dog."
    assert rules["more_edges"].answer(SENTENCES[1].question) is None
    tables = OFFERS["pointers"].rules
    assert [rule.answer("a b | b c | c a ? from a go 2") for rule in tables.values()] == ["a", "b"]


@pytest.mark.parametrize(("task", "question"), [
    ("prosqa", "0 3 | 3 5 | 1 4 ? 5 or 4 from 0"), ("prosqa", SENTENCES[0].question),
    ("pointers", "a b | b c | c a ? from a go 2"),
])  # fmt: skip
def test_a_hint_is_read_past(task: str, question: str) -> None:
    judge = TASKS[task]
    hinted = with_hint(question, "dog")
    assert hinted == f"Hint: dog. {question}"
    assert split_hint(hinted) == ("dog", question)
    assert split_hint(question) == (None, question)
    assert with_hint(hinted, "cat") == with_hint(question, "cat")
    assert with_hint(hinted, None) == question
    assert judge.candidates(hinted) == judge.candidates(question)
    if task == "prosqa":
        told = prosqa.told_edges(question)
        assert prosqa.told_edges(hinted) == told
        assert prosqa.retell(hinted, told[::-1]) == with_hint(prosqa.retell(question, told[::-1]), "dog")
        edges = prosqa.parse_question(question).edges
        assert prosqa.with_edges(hinted, edges) == hinted


def test_settings_of_files_that_were_read_are_refused() -> None:
    with pytest.raises(NotApplicable, match="read from files"):
        builder_keys({"task": "prosqa", "sources": {}})
    dials = {"form": "symbols", "names": "released", "nodes": 10, "edges": 12, "branching": 1.5, "hops_to": None}
    keys = builder_keys({"task": "prosqa", "preset": "released", "dials": dials})
    assert keys == {"preset": "released", "form": "symbols", "nodes": 10, "edges": 12}
