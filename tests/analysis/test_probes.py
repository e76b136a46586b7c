"""Probes: any number of thoughts, the values of nodes, inner products, logit lens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from helpers.models import SENTENCES, build, in_sentences, subject
from helpers.runs import graph_rows

from coconut.analysis import node_probabilities as names
from coconut.analysis.graph_paths import Outcome
from coconut.analysis.interventions import audit_edges, audit_thoughts
from coconut.analysis.node_probabilities import spell
from coconut.analysis.probes import Subject, decoded, inner_products, k_forcing, next_step_values, stopping
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions, encode_texts
from coconut.generation.stop_classifier import Measured, StopClassifier
from coconut.methods import NOTHING, PAUSES, PromptFormat
from coconut.runs.study import NotApplicable, Study

SYMBOLS = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=1, count=6)]
SUMS = [Example("1 + 1", ("<<1+1=2>>",), "2"), Example("2 + 3", (), "5")]


def symbolic(family: str = "llama", examples: list[Example] = SYMBOLS, batch_size: int = 4, **options: Any) -> Subject:
    reasoning = {"num_thoughts": 2, "format": PromptFormat("{}", "{} ", "### {}"), "max_new_tokens": 5} | options
    return subject(build(family, **reasoning), examples, batch_size=batch_size)


def rows_of(study: Study, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in study.rows if all(row[key] == value for key, value in keys.items())]


def by_whole_sequences(examined: Subject, question: int, after: int, forced: str, node: str) -> float:
    """The probability of a name, from one uncached pass over the whole sequence."""
    lm = examined.lm
    prompt = encode_questions(lm.tokenizer, [examined.examples[question].question], lm.reasoning.format)[0]
    prompt += slot_with_markers(lm.reasoning, lm.special, after).tolist()
    before, name = encode_texts(lm.tokenizer, [forced, f" {node}" if forced else node])
    ids = torch.tensor([prompt + before + name])
    labels = ids.clone()
    labels[:, : len(prompt + before)] = -100
    return float(lm.log_probs(ids, labels=labels, use_cache=False).detach().sum().exp())


def test_values_in_symbols_equal_uncached_probabilities(family: str) -> None:
    examined = symbolic(family)
    values, *_ = next_step_values(examined)
    assert {row["after"] for row in values.rows} == {0, 1, 2}
    assert len(values.rows) == 3 * sum(len(asked.graph) for asked in examined.graphs)
    for row in values.rows[::5]:
        expected = by_whole_sequences(examined, row["question"], row["after"], "", row["node"])
        assert row["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("start", [False, True])
def test_values_of_names_of_several_tokens_equal_uncached_probabilities(start: bool) -> None:
    examined = in_sentences(start=start)
    lengths = {len(spelling.name) for spelling in spell(examined.lm, list(examined.graphs[0].graph), False).values()}
    assert len(lengths) > 2
    values, *_ = next_step_values(examined)
    assert values.facts["warning"].startswith("The run was trained without mixing")
    facts = {"form": "sentences", "offset": 0, "thoughts_per_step": 1, "warning": None}
    assert values.facts | {"warning": None} == facts
    assert {row["after"] for row in values.rows} == {1, 2}
    for row in values.rows:
        expected = by_whole_sequences(examined, row["question"], row["after"], "Every", row["node"])
        assert row["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [symbolic, in_sentences])
def test_values_do_not_depend_on_the_batch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = next_step_values(make())[0].rows
    monkeypatch.setattr(names, "_CACHE_BYTES", 1)  # one name at a time
    alone = next_step_values(make(batch_size=1))[0].rows
    for one, other in zip(together, alone, strict=True):
        assert one | {"value": 0} == other | {"value": 0}
        assert one["value"] == pytest.approx(other["value"], rel=1e-4)


def test_names_are_encoded_as_in_a_step() -> None:
    examined = in_sentences()
    template, nodes = examined.lm.reasoning.format.step, list(examined.graphs[0].graph)
    for node, spelling in spell(examined.lm, nodes, symbolic=False).items():
        step = encode_texts(examined.lm.tokenizer, [PromptFormat.fill(template, f"Every {node} is a cat.")])[0]
        assert tuple(step[: len(spelling.before + spelling.name)]) == spelling.before + spelling.name
        assert examined.lm.tokenizer.decode([*spelling.before]) == "Every"
        assert str(examined.lm.tokenizer.decode([*spelling.name])).strip() == node
    for node, spelling in spell(examined.lm, ["12", "7"], symbolic=True).items():
        assert spelling.before == ()
        assert examined.lm.tokenizer.decode([*spelling.name]) == node


def test_value_rows_describe_the_position_of_nodes() -> None:
    examined = symbolic()
    values, *_ = next_step_values(examined)
    assert values.facts | {"warning": None} == {"form": "symbols", "offset": 1, "thoughts_per_step": 1, "warning": None}
    for row in values.rows:
        asked = examined.graphs[row["question"]]
        graph, node = asked.graph, row["node"]
        reached = networkx.has_path(graph, asked.root, node)
        assert row["distance"] == (networkx.shortest_path_length(graph, asked.root, node) if reached else None)
        assert row["leads"] == networkx.has_path(graph, node, asked.target)
        leaves = [leaf for leaf in graph if graph.out_degree(leaf) == 0 and leaf != node]
        heights = [len(path) - 1 for path in networkx.all_simple_paths(graph, node, leaves)]
        assert (row["height_shortest"], row["height_longest"]) == (min(heights, default=0), max(heights, default=0))
        next_to_write = reached and row["distance"] == row["after"] + 1
        assert row["ahead"] == (next_to_write and row["after"] < len(examined.examples[row["question"]].steps))
    for after in (0, 1):
        assert {row["question"] for row in rows_of(values, after=after, ahead=True)} == set(range(len(SYMBOLS)))


def test_values_are_taken_after_whole_steps_only() -> None:
    examined = in_sentences(thoughts_per_step=2)
    values, *_ = next_step_values(examined)
    assert {row["after"] for row in values.rows} == {2, 4}
    ahead = {(row["question"], row["after"], row["node"]) for row in values.rows if row["ahead"]}
    assert ahead == {(0, 2, "wumpus"), (0, 4, "cat"), (0, 4, "vumpus"), (1, 2, "cat")}


def test_parallelism_sorts_each_cumulated_value_separately() -> None:
    values, parallelism, _ = next_step_values(symbolic())
    for after in (0, 1):
        ahead = [
            sorted((row["value"] for row in rows_of(values, after=after, ahead=True, question=question)), reverse=True)
            for question in range(len(SYMBOLS))
        ]
        curves = rows_of(parallelism, after=after)
        assert [row["percentile"] for row in curves] == list(range(101))
        for top in (1, 2, 3):
            cumulated = [sum(likeliest[:top]) for likeliest in ahead]
            curve = [row[f"top{top}"] for row in curves]
            assert curve == sorted(curve)
            expected = [min(cumulated), float(np.median(cumulated)), max(cumulated)]
            assert [curve[0], curve[50], curve[100]] == pytest.approx(expected)


def test_heights_are_means_over_nodes_ahead() -> None:
    values, _, heights = next_step_values(symbolic())
    for row in heights.rows:
        same = {"after": row["after"], f"height_{row['kind']}": row["height"], "leads": row["leads"], "ahead": True}
        found = [each["value"] for each in rows_of(values, **same)]
        assert row["count"] == len(found)
        assert row["mean"] == pytest.approx(np.mean(found))
        assert row["se"] == (pytest.approx(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None)
    for kind in ("shortest", "longest"):
        assert sum(row["count"] for row in rows_of(heights, kind=kind)) == len(rows_of(values, ahead=True))


def test_each_number_of_thoughts_is_forced() -> None:
    examined = symbolic()
    study = k_forcing(examined)
    assert [row["thoughts"] for row in study.rows] == [0, 1, 2, 3, 4]
    for row in study.rows:
        result, _, thoughts = examined.ask(num_thoughts=row["thoughts"])
        assert thoughts.shape[1] == row["thoughts"]
        assert (row["accuracy"], (row["low"], row["high"])) == (result.accuracy, result.interval)
        assert row["new_tokens"] == result.mean_new_tokens
        assert sum(row[outcome] for outcome in Outcome) == row["questions"] == len(SYMBOLS)
    assert study.facts["trained_thoughts"] == 2


def test_k_forcing_has_no_outcomes_without_graphs() -> None:
    for examples, task in ((SUMS, "gsm8k"), (SUMS, "prosqa")):
        study = k_forcing(subject(build("llama", num_thoughts=1, max_new_tokens=2), examples, task))
        assert len(study.rows) == 4
        assert {row[outcome] for row in study.rows for outcome in Outcome} == {None}


def test_k_forcing_forces_pauses_and_warns_of_a_run_without_mixing() -> None:
    study = k_forcing(symbolic(slot=PAUSES, method="pause"))
    assert [row["thoughts"] for row in study.rows] == [0, 1, 2, 3, 4]
    examined = symbolic()
    assert "without mixing" in k_forcing(examined).facts["warning"]
    mixed = k_forcing(replace(examined, trained_with_fewer_thoughts=True)).facts["warning"]
    assert mixed.startswith("The model was never trained with more than 2 thoughts")


def test_stopping_compares_the_classifier_with_a_constant_number() -> None:
    """One that never stops changes nothing; one that always stops leaves one thought."""
    examined = symbolic()
    for bias, thoughts in ((-1.0, 2), (1.0, 1)):
        classifier = StopClassifier(32, Measured(trained_on=100, accuracy=0.9, by_place=[0.8, 1], positives=[0.2, 0.6]))
        last = classifier.layers[-1]
        assert isinstance(last, torch.nn.Linear)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, bias)
        study = stopping(examined, classifier)
        assert [(row["rule"], row["thoughts"]) for row in study.rows] == [("constant", 2), ("classifier", thoughts)]
        expected = examined.forced(thoughts).result
        assert (study.rows[1]["accuracy"], study.rows[1]["low"]) == (expected.accuracy, expected.interval[0])
        assert study.facts == {"classifier_accuracy": 0.9, "by_place_alone": pytest.approx(0.7), "trained_on": 100}


@pytest.mark.parametrize("make", [symbolic, in_sentences])
def test_inner_products_are_grouped_by_the_position_of_nodes(make: Any) -> None:
    examined = make()
    lm, found = examined.lm, inner_products(examined)
    spellings = spell(lm, sorted({node for asked in examined.graphs for node in asked.graph}), examined.symbolic)
    embed = lm.base.get_input_embeddings().weight.detach()
    for thought in (1, 2):
        groups: dict[str, list[float]] = {}
        for asked, thoughts_KD in zip(examined.graphs, examined.baseline.thoughts, strict=True):
            shortest = list(networkx.all_shortest_paths(asked.graph, asked.root, asked.target))
            reached = networkx.single_source_shortest_path_length(asked.graph, asked.root)
            if len(shortest[0]) <= thought:
                continue
            for node in asked.graph:
                optimal = any(path[thought] == node for path in shortest)
                exactly, within = reached.get(node) == thought, reached.get(node, math.inf) <= thought
                group = "optimal" if optimal else "frontier" if exactly else "reachable" if within else "other"
                vector = torch.stack([embed[token] for token in spellings[node].name]).float().mean(0)
                groups.setdefault(group, []).append(float(thoughts_KD[thought - 1] @ vector))
        rows = rows_of(found, thought=thought)
        assert {row["group"] for row in rows} == set(groups)
        for row in rows:
            values = groups[row["group"]]
            assert (row["mean"], row["count"]) == (pytest.approx(np.mean(values), rel=1e-4, abs=1e-5), len(values))
            assert row["sd"] == (pytest.approx(np.std(values, ddof=1), rel=1e-3) if len(values) > 1 else None)


def test_decoded_thoughts_equal_the_output_layer_on_them() -> None:
    examined = symbolic()
    study = decoded(examined, count=2)
    assert len(study.rows) == 2 * 2 * 5
    for row in study.rows:
        logits_V = examined.lm.logits(examined.baseline.thoughts[row["question"], row["thought"] - 1].double())
        values, ids = logits_V.detach().softmax(-1).topk(5)
        assert row["probability"] == pytest.approx(float(values[row["rank"] - 1]), rel=1e-5)
        assert row["token"] == examined.lm.tokenizer.decode([int(ids[row["rank"] - 1])])
    without_graphs = subject(build("llama", num_thoughts=1, max_new_tokens=2), SUMS, "gsm8k")
    assert {row["question"] for row in decoded(without_graphs).rows} == {0, 1}


def test_studies_that_need_thoughts_refuse_other_methods() -> None:
    for study in (next_step_values, inner_products, decoded, audit_thoughts):
        with pytest.raises(NotApplicable, match=r"pause has no latent .* pauses\. .*: coconut, without_curriculum, co"):
            study(symbolic(slot=PAUSES, method="pause"))
        with pytest.raises(NotApplicable, match="coconut has no thoughts yet at stage 0"):
            study(symbolic(num_thoughts=0))
    with pytest.raises(
        NotApplicable, match=r"cot has nothing in its slot.*: coconut, pause, .*, pause_as_thought, codi"
    ):
        k_forcing(symbolic(slot=NOTHING, method="cot", markers=False, num_thoughts=0))


def test_studies_that_need_graphs_refuse_other_tasks() -> None:
    lm = build("llama", num_thoughts=1, max_new_tokens=2)
    for study in (next_step_values, inner_products, audit_edges):
        with pytest.raises(NotApplicable, match=r"questions of gsm8k describe no graph\. Tasks with graphs: prosqa"):
            study(subject(lm, SUMS, "gsm8k"))
        with pytest.raises(NotApplicable, match=r"Question 7 describes no graph\. The question ends neither"):
            study(subject(lm, [*SYMBOLS, SUMS[0]]))
        if study is not audit_edges:
            with pytest.raises(NotApplicable, match="Some questions are in symbols and others in sentences"):
                study(subject(lm, [*SYMBOLS, *SENTENCES]))


def test_studies_leave_the_model_unchanged_and_evaluate_it_once() -> None:
    examined = symbolic()
    examined.lm.train()
    next_step_values(examined)
    assert examined.lm.training
    assert examined.baseline is examined.forced(2)
    assert examined.forced(0) is examined.forced(0)
