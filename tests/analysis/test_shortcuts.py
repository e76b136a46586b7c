"""Whether a model solves its task or takes a shortcut: changed questions, rules, harder questions, hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import networkx
import numpy as np
import pytest
from helpers.memorizing import EXAMPLES, memorizing_model
from helpers.models import by_recomputation
from helpers.shortcut_takers import graph_examples, last_option_model

from coconut import LatentLM
from coconut.analysis.probes import Subject
from coconut.analysis.question_edits import OFFERS
from coconut.analysis.shortcuts import _Trained, shortcuts
from coconut.analysis.statistics import independent_difference_interval
from coconut.config import DataConfig, DataFiles, TaskName
from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import Evaluated, summarize
from coconut.methods import NOTHING
from coconut.reporting.measurements.shortcuts import describe
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS, prosqa
from coconut.tasks.hints import split_hint
from coconut.utils.files import write_json
from data_builders.pointers import draw_row

PROSQA = TASKS["prosqa"]
TEST = graph_examples(seed=2, count=60)


@pytest.fixture(scope="module")
def taker() -> LatentLM:
    return last_option_model()


@pytest.fixture(scope="module")
def study(taker: LatentLM) -> Study:
    return shortcuts(Subject(taker, PROSQA, TEST, batch_size=32))


def row_of(study: Study, change: str) -> dict[str, Any]:
    return next(row for row in study.rows if row["change"] == change)


def first_sentence(study: Study) -> str:
    return describe(study)[0]


def test_a_model_that_takes_the_option_named_last_is_told(study: Study) -> None:
    right, wrong = row_of(study, "named_last_right"), row_of(study, "named_last_wrong")
    assert right["accuracy"] > 0.95
    assert wrong["accuracy"] < 0.05
    assert right["questions"] + wrong["questions"] == len(TEST)
    assert row_of(study, "option_order")["changed"] > 0.95
    assert row_of(study, "edge_order")["changed"] < 0.05
    assert first_sentence(study) == "The model relies on the order of the options and “the option named last”."


def test_a_model_that_knows_its_questions_by_heart_is_not_taken_for_one() -> None:
    study = shortcuts(Subject(memorizing_model(), PROSQA, EXAMPLES))
    assert row_of(study, "none")["accuracy"] > 0.8
    assert "named last" not in first_sentence(study)
    assert row_of(study, "new_names")["accuracy"] < 0.7, "other names make another question"
    assert "the names of the nodes" in first_sentence(study)


# The same by hand: one question at a time, without a cache or padding.


def written(lm: LatentLM, question: str) -> str | None:
    """The option that the model answers with."""
    (ids,) = encode_questions(lm.tokenizer, [question], lm.reasoning.format)
    text = str(lm.tokenizer.decode(by_recomputation(lm, ids, lm.reasoning.num_thoughts, 4)))
    return text.split("###")[1].strip() if "###" in text else None


def exchanged(question: str) -> str:
    told, asked = question.split(" ? ")
    first, _, second, *rest = asked.split()
    return f"{told} ? {second} or {first} {' '.join(rest)}"


def depth(question: str, option: str) -> int:
    told = networkx.DiGraph([(pair[0], pair[2:]) for pair in question.split(" ? ")[0].split(" | ")])
    sources = [node for node in told if not told.in_degree(node)]
    lengths: dict[str, int] = dict(networkx.single_target_shortest_path_length(told, option))
    return max(lengths[source] for source in sources if source in lengths)


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    share, n = hits / count, count
    middle, half = share + z**2 / (2 * n), z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def test_rows_equal_a_slow_reading(taker: LatentLM, study: Study) -> None:
    lm = taker
    own = [written(lm, example.question) for example in TEST]
    golds = [example.answer for example in TEST]
    right = [answer == gold for answer, gold in zip(own, golds, strict=True)]
    turned = [written(lm, exchanged(example.question)) for example in TEST]
    row = row_of(study, "option_order")
    accuracy = sum(a == gold for a, gold in zip(turned, golds, strict=True)) / len(TEST)
    assert row["accuracy"] == pytest.approx(accuracy)
    assert row["difference"] == pytest.approx(accuracy - sum(right) / len(TEST))
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert row["changed"] == pytest.approx(sum(a != b for a, b in zip(own, turned, strict=True)) / len(TEST))
    assert (row["low"], row["high"]) == pytest.approx(wilson(round(accuracy * len(TEST)), len(TEST)), abs=1e-5)
    depths = [[depth(e.question, option) for option in prosqa.parse_question(e.question).options] for e in TEST]
    sets: dict[str, list[bool]] = {"deeper_right": [], "deeper_wrong": []}
    for example, is_right, (first, second) in zip(TEST, right, depths, strict=True):
        deeper = prosqa.parse_question(example.question).options[second > first]
        if first != second:
            sets["deeper_right" if deeper == example.answer else "deeper_wrong"].append(is_right)
    for name, of_set in sets.items():
        row = row_of(study, name)
        assert (row["questions"], row["accuracy"]) == (len(of_set), pytest.approx(np.mean(of_set)))
    lost = np.mean(sets["deeper_wrong"]) - np.mean(sets["deeper_right"])
    assert row_of(study, "deeper_wrong")["difference"] == pytest.approx(lost)


def test_questions_whose_options_are_equally_deep_are_set_against_the_others(taker: LatentLM) -> None:
    """The right option is the deeper one, or as deep as the other and then always named first."""
    found = []
    for draw in map(Random, range(12)):
        a, b, c, d, e = draw.sample("01234567", 5)
        found += [
            (f"{a} {b} | {c} {d} ? {b} or {d} from {a}", b),
            (f"{a} {b} | {b} {e} | {c} {d} ? {d} or {e} from {a}", e),
        ]
    study = shortcuts(Subject(taker, PROSQA, [Example(question, (), answer) for question, answer in found]))
    row, own = row_of(study, "equal_depth"), row_of(study, "none")
    assert (row["questions"], row["against"]) == (12, "rest")
    assert row["difference"] == pytest.approx(row["accuracy"] - (2 * own["accuracy"] - row["accuracy"]))
    assert row["difference_high"] < 0
    assert "the depth of the options" in first_sentence(study)
    assert study.facts["left_out"]["deeper"] == "it is wrong in 0 questions; 10 are needed"


def test_rows_do_not_depend_on_the_batch(taker: LatentLM, study: Study) -> None:
    assert shortcuts(Subject(taker, PROSQA, TEST, batch_size=7)).rows == study.rows
    assert len({tuple(row) for row in study.rows}) == 1, "all rows have the same keys"


def test_a_method_without_a_slot_is_asked_too(taker: LatentLM) -> None:
    before = taker.reasoning
    taker.reasoning = replace(before, slot=NOTHING, num_thoughts=0)
    try:
        assert len(shortcuts(Subject(taker, PROSQA, TEST[:30])).rows) > 4
    finally:
        taker.reasoning = before


def test_independent_differences_have_newcombes_interval() -> None:
    """The first example of his paper, 56 of 70 against 48 of 80: 0.0524 to 0.3339."""
    a_N, b_M = np.arange(70) < 56, np.arange(80) < 48
    assert independent_difference_interval(a_N, b_M) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = independent_difference_interval(np.ones(30, bool), np.ones(30, bool))
    assert low < -0.05
    assert high > 0.05


# What does not apply.


def test_what_does_not_apply_is_named(taker: LatentLM, study: Study) -> None:
    with pytest.raises(NotApplicable, match=r"for gsm8k.*Tasks with shortcuts: prosqa, pointers, prontoqa"):
        shortcuts(Subject(taker, TASKS["gsm8k"], [Example("1 + 1 ?", (), "2")]))
    with pytest.raises(NotApplicable, match="Question 2 does not name its answer '99'"):
        shortcuts(Subject(taker, PROSQA, [TEST[0], replace(TEST[1], answer="99")]))
    without = "the run's training data are not at hand"
    left_out = {
        "more_edges": "it is right in 6 questions; 10 are needed",
        "equal_depth": "0 of 60 questions are such ones",
    }
    assert study.facts["left_out"] == left_out | dict.fromkeys(("longer_1", "longer_2", "larger", "hint"), without)
    few = shortcuts(Subject(taker, PROSQA, TEST[:4]))
    assert [row["change"] for row in few.rows] == ["none"]
    assert few.facts["left_out"]["option_order"] == "there are 4 such questions; at least 10 are needed"
    assert first_sentence(few) == "It is not clear whether a shortcut is used."


def test_words_that_the_tokenizer_lacks_are_named(taker: LatentLM) -> None:
    rows = [found[0] for seed in range(30) if (found := draw_row(Random(seed), lambda key: True, 5, 1, 3, 1.0))]
    tables = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in rows]
    study = shortcuts(Subject(taker, TASKS["pointers"], tables))
    left_out = study.facts["left_out"]
    assert left_out["option_order"] == left_out["denser"] == "there is no such change for pointers"
    assert left_out["edge_order"].startswith("the tokenizer has no token for a, b, c, d, e")


# Data that are made.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data` section of a run whose data are made: few graphs, all with a hint."""
    build = {"preset": "graphs", "nodes": 8, "num_train": 40, "num_valid": 1, "num_test": 12, "hint": 1.0}
    config = DataConfig(TaskName.prosqa, build=build, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return asdict(config)


def test_harder_questions_are_made_from_the_settings_of_the_run(taker: LatentLM, data: dict[str, Any]) -> None:
    trained = _Trained.read(data)
    assert (trained.longest, trained.hinted) == (3, 1.0)
    assert trained.keys == {"preset": "graphs", "form": "symbols", "nodes": 8, "hops_from": 2, "hops_to": 3}
    found = shortcuts(Subject(taker, PROSQA, TEST[:20]), data)
    row = row_of(found, "longer_1")
    assert row["label"] == "chains of 4 steps, 1 more than trained"
    assert 10 <= row["questions"] <= 20
    left_out = found.facts["left_out"]
    assert left_out["longer_2"] == "graphs of 8 nodes have no room for chains of 5"
    assert left_out["larger"] == "the tokenizer has no token for 8, 9"
    assert left_out["hint_right"] == left_out["hint_wrong"] == "the tokenizer has no token for ., :, Hint"


def test_no_question_of_the_training_file_is_made(data: dict[str, Any]) -> None:
    trained = _Trained.read(data)
    keys = OFFERS["prosqa"].longer(trained.keys, 4)  # pyright: ignore
    made = trained.others("prosqa", "longer_1", keys, 20, 4)
    assert {len(example.steps) for example in made} == {4}
    hinted = replace(made[0], question=f"Hint: {made[0].answer}.  {made[0].question}")
    again = replace(trained, examples=[*trained.examples, hinted]).others("prosqa", "longer_1", keys, 20, 4)
    assert made[0].question not in {example.question for example in again}
    assert again[:19] == made[1:]


def test_another_training_file_than_the_manifests_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    trained = _Trained.read(data)
    named = tmp_path / "prosqa_train.json"
    named.write_text(trained.file.read_text() + "\n")
    with pytest.raises(NotApplicable, match="no manifest beside"):
        _ = replace(trained, file=named).keys
    manifest = trained.file.with_name("prosqa_manifest.json")
    (tmp_path / manifest.name).write_text(manifest.read_text())
    with pytest.raises(NotApplicable, match="describes another training file"):
        _ = replace(trained, file=named).keys


def test_hints_are_planted_in_training_questions_only(data: dict[str, Any]) -> None:
    for split in ("train", "test"):
        for example in read_examples(_Trained.read(data).file.with_name(f"prosqa_{split}.json")):
            assert split_hint(example.question)[0] == (example.answer if split == "train" else None)


class Gullible(Subject):
    """Answers with the hint, if there is one, and else rightly."""

    def ask(self, examples: Sequence[Example] | None = None, **options: Any) -> Evaluated:
        chosen = list(self.examples if examples is None else examples)
        real = super().ask(chosen, **options)
        said = [split_hint(example.question)[0] or example.answer for example in chosen]
        predictions = [replace(p, predicted=word, correct=word == p.gold)
                       for p, word in zip(real.predictions, said, strict=True)]  # fmt: skip
        return Evaluated(summarize(self.task, chosen, predictions, 1.0, ()), predictions, real.thoughts)


def test_a_model_that_follows_hints_is_told(
    taker: LatentLM, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coconut.analysis.shortcuts.unknown_id", lambda tokenizer: None)
    found = shortcuts(Gullible(taker, PROSQA, TEST[:20]), data)
    right, wrong = row_of(found, "hint_right"), row_of(found, "hint_wrong")
    assert (right["accuracy"], right["changed"]) == (1.0, 0.0)
    assert (wrong["accuracy"], wrong["changed"], wrong["difference"]) == (0.0, 1.0, -1.0)
    assert (found.facts["followed_wrong_hint"], found.facts["named_without_hint"]) == (1.0, 0.0)
    told = describe(found)
    assert told[0] == "The model relies on the hint."
    followed = "a wrong one is followed by 100.0 % of the answers (83.9 to 100.0), and 0.0 % name the same wrong answer"
    assert any(followed in sentence for sentence in told)


def test_data_without_hints_are_named(taker: LatentLM, data: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    rows = [{"question": each.question, "steps": list(each.steps), "answer": each.answer} for each in TEST[:10]]
    write_json(file, rows)
    named = asdict(DataConfig(TaskName.prosqa, train=str(file), valid=str(file)))
    found = shortcuts(Subject(taker, PROSQA, TEST[:20]), named)
    assert "the training questions have no hints" in found.facts["left_out"]["hint"]
    assert found.facts["hinted"] == 0.0
    assert found.facts["left_out"]["larger"].startswith("no manifest beside the training file")
    gone = {**named, "train": str(tmp_path / "gone.json")}
    assert "gone.json" in shortcuts(Subject(taker, PROSQA, TEST[:20]), gone).facts["left_out"]["hint"]
    assert shortcuts(Subject(taker, PROSQA, TEST[:20]), gone, DataFiles(train=str(file))).rows == found.rows


# The sentences.


def made_row(change: str, kind: str, label: str, accuracy: float, **values: Any) -> dict[str, Any]:
    row = {"change": change, "kind": kind, "label": label, "questions": 500, "accuracy": accuracy,
           "low": accuracy - 0.03, "high": accuracy + 0.03, "chance_accuracy": 0.5, "against": "none"}  # fmt: skip
    for name in ("difference", "changed"):
        value = values.get(name)
        row |= {name: value, **{f"{name}_{end}": None if value is None else value + by
                                for end, by in (("low", -0.02), ("high", 0.02))}}  # fmt: skip
    return row | {key: value for key, value in values.items() if key not in row}


def test_the_sentences_follow_the_intervals() -> None:
    own = made_row("none", "unchanged", "unchanged", 0.95)
    order = made_row("edge_order", "edit", "the edges in another order", 0.8, difference=-0.15, changed=0.2)
    names = made_row("new_names", "edit", "other names for the nodes", 0.94, difference=-0.01, changed=0.02)
    exchanged_row = made_row("option_order", "edit", "the options exchanged", 0.91, difference=-0.04, changed=0.12)
    longer = made_row("longer_1", "distribution", "chains of 4 steps, 1 more than trained", 0.52, difference=-0.43)
    study = Study("shortcuts", [own, order, names, exchanged_row, longer], {"left_out": {}})
    told = describe(study)
    assert told == [
        "The model relies on the order in which the facts are told.",
        "With the edges in another order 80.0 % are right, against 95.0 %: −15.0 points (−17.0 to −13.0).",
        "Less than 5 points of its accuracy, if any, hang on each of these: the names of the nodes.",
        "Too few questions to tell: the order of the options.",
        "With the options exchanged 12.0 % of the answers change, though about as many are right.",
        "Out of distribution, on chains of 4 steps, 1 more than trained, 52.0 % are right, −43.0 points (−45.0 to "
        "−41.0); this is not clearly above chance (50.0 %).",
    ]
    assert describe(Study("shortcuts", [own, names], {"left_out": {}}))[0] == "No use of a shortcut was seen."
    guessing = made_row("none", "unchanged", "unchanged", 0.51)
    told = describe(Study("shortcuts", [guessing, names], {"left_out": {}}))
    assert "not clearly above chance (50.0 %)" in told[1]
    assert not any("points of its accuracy" in sentence for sentence in told), "it has none to lose"
