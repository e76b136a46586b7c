"""Interventions on thoughts and graphs, and the sentences that summarize them."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from helpers.memorizing import EXAMPLES, memorizing_model
from helpers.models import build
from scipy.stats import binomtest

from coconut import LatentLM
from coconut.analysis import interventions
from coconut.analysis.graph_paths import redirect
from coconut.analysis.interventions import audit_edges, audit_thoughts, edges_verdict, share_lost, thoughts_verdict
from coconut.analysis.probes import Subject
from coconut.analysis.statistics import difference_interval
from coconut.data.examples import Example
from coconut.evaluation.evaluator import Evaluated
from coconut.methods import PAUSES
from coconut.runs.study import Study
from coconut.tasks import TASKS, prosqa

SUMS = [Example("1 + 1", (), "2"), Example("2 + 3", (), "5"), Example("3 + 3", (), "6")]


@pytest.fixture(scope="module")
def examined() -> Subject:
    return Subject(memorizing_model(), TASKS["prosqa"], EXAMPLES, batch_size=16)


@pytest.fixture(scope="module")
def thoughts(examined: Subject) -> Study:
    return audit_thoughts(examined)


@pytest.fixture(scope="module")
def edges(examined: Subject) -> Study:
    return audit_edges(examined)


def by_change(study: Study) -> dict[str, dict[str, Any]]:
    return {row["change"]: row for row in study.rows}


def predicted(found: Evaluated) -> list[str | None]:
    return [prediction.predicted for prediction in found.predictions]


def test_recorded_thoughts_give_the_same_answers(examined: Subject) -> None:
    assert examined.ask(thoughts=examined.baseline.thoughts).predictions == examined.baseline.predictions


def test_rows_of_interventions_hold_accuracy_and_changed_answers(examined: Subject, thoughts: Study) -> None:
    rows = by_change(thoughts)
    assert list(rows) == ["none", "zeros", "noise", "mean", "other", "order", "thought_1", "thought_2", "thought_3",
                          "count_0", "count_1", "count_2", "count_4", "count_5"]  # fmt: skip
    trained_NKD = examined.baseline.thoughts
    mean_NKD = trained_NKD.mean(0, keepdim=True).expand_as(trained_NKD)
    without_2 = torch.stack([trained_NKD[:, 0], mean_NKD[:, 1], trained_NKD[:, 2]], dim=1)
    changes = {"zeros": 0 * trained_NKD, "mean": mean_NKD, "order": trained_NKD[:, [2, 0, 1]], "thought_2": without_2}
    answers = {name: examined.ask(thoughts=changed_NKD) for name, changed_NKD in changes.items()}
    answers |= {f"count_{count}": examined.ask(num_thoughts=count) for count in (0, 5)}
    was = examined.baseline
    for name, found in answers.items():
        row = rows[name]
        assert row["accuracy"] == found.result.accuracy
        assert (row["low"], row["high"]) == pytest.approx(found.result.interval)
        assert row["difference"] == pytest.approx(found.result.accuracy - was.result.accuracy)
        pair = ([[prediction.correct for prediction in each.predictions]] for each in (found, was))
        assert (row["difference_low"], row["difference_high"]) == difference_interval(*map(np.array, pair))
        changed = sum(new != old for new, old in zip(predicted(found), predicted(was), strict=True))
        interval = binomtest(changed, len(EXAMPLES)).proportion_ci(method="wilson")
        assert (row["changed"], row["changed_low"]) == (changed / len(EXAMPLES), pytest.approx(interval.low))
        assert row["questions"] == len(EXAMPLES)
        options_of = [prosqa.candidates(example.question) or [] for example in EXAMPLES]
        outside = [text not in options for text, options in zip(predicted(found), options_of, strict=True)]
        assert row["neither"] == sum(outside) / len(EXAMPLES)
    assert rows["none"]["accuracy"] == was.result.accuracy
    assert {rows["none"][key] for key in rows["none"] if key.startswith(("difference", "changed"))} == {0.0}
    assert len({tuple(row) for row in thoughts.rows}) == 1
    assert any(row["changed"] for row in thoughts.rows)


def test_other_questions_is_a_permutation_without_fixed_points() -> None:
    for count in (2, 3, 24):
        found = interventions.other_questions(count)
        assert sorted(found) == list(range(count))
        assert (found != np.arange(count)).all()


def test_noise_has_the_norm_of_the_thoughts_and_is_reproducible(examined: Subject, thoughts: Study) -> None:
    trained_NKD = examined.baseline.thoughts
    both = [interventions.changed_thoughts(trained_NKD) for _ in range(2)]
    changed, again = ({name: thoughts_NKD for name, _, thoughts_NKD in each} for each in both)
    torch.testing.assert_close(changed["noise"].norm(dim=-1), trained_NKD.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(changed["noise"], trained_NKD, dim=-1).abs().mean() < 0.3
    assert torch.equal(changed["noise"], again["noise"])
    assert torch.equal(changed["other"], trained_NKD[interventions.other_questions(len(EXAMPLES))])


def test_interventions_need_a_second_thought_or_question() -> None:
    always = {"none", "zeros", "noise", "mean", "other"}
    for count, further in [(1, set()), (2, {"order", "thought_1", "thought_2"})]:
        lm = build("llama", torch.float32, num_thoughts=count, max_new_tokens=2)
        rows = by_change(audit_thoughts(Subject(lm, TASKS["gsm8k"], SUMS)))
        assert set(rows) == always | further | {f"count_{k}" for k in range(count + 3) if k != count}
    study = audit_thoughts(Subject(lm, TASKS["gsm8k"], SUMS[:1]))
    assert set(by_change(study)) == {"none", "zeros", "noise", "order", "count_0", "count_1", "count_3", "count_4"}
    assert study.facts["verdict"][0].startswith("It is not clear whether the thoughts are used")


def test_answers_to_changed_graphs_are_counted(examined: Subject, edges: Study) -> None:
    right = [i for i, prediction in enumerate(examined.baseline.predictions) if prediction.correct]
    assert edges.facts["right"] == len(right) > 4
    rows = by_change(edges)
    assert list(rows) == ["redirected", "redirected_old_thoughts", "redirected_thoughts_only", "removed",
                          "removed_elsewhere"]  # fmt: skip
    for name in ("redirected", "removed", "removed_elsewhere"):
        assert rows[name]["questions"] == len(right) - edges.facts["left_out"][name] > 4
    for name, row in rows.items():
        assert (row["followed"] is None) == name.startswith("removed")
        assert row["changed_low"] <= row["changed"] <= row["changed_high"]
        if row["followed"] is not None:
            assert row["followed_low"] <= row["followed"] <= row["followed_high"]
            assert row["followed"] <= row["changed"]  # an answer that names the other option has changed
    assert edges.facts["redirections"]["swapped"] <= rows["redirected"]["questions"]


def test_answers_follow_if_they_name_the_right_option_of_the_changed_graph(examined: Subject, edges: Study) -> None:
    right = [i for i, prediction in enumerate(examined.baseline.predictions) if prediction.correct]
    found = {i: redirect(examined.graphs[i], Random(f"0 {i}")) for i in right}
    questions = {i: each.question for i, each in found.items() if each}
    before, asked = [EXAMPLES[i] for i in questions], list(questions)
    turned = [replace(EXAMPLES[i], question=question) for i, question in questions.items()]
    for example in turned:
        told = prosqa.graph(example.question)
        reachable = [option for option in told.graph["options"] if networkx.has_path(told, told.graph["root"], option)]
        assert reachable == [examined.graphs[EXAMPLES.index(before[turned.index(example)])].other]
    again = examined.ask(turned)
    answers = {
        "redirected": again,
        "redirected_old_thoughts": examined.ask(turned, thoughts=examined.baseline.thoughts[asked]),
        "redirected_thoughts_only": examined.ask(before, thoughts=again.thoughts),
    }
    for name, each in answers.items():
        follows = [answer == examined.graphs[i].other for answer, i in zip(predicted(each), asked, strict=True)]
        stays = [answer == EXAMPLES[i].answer for answer, i in zip(predicted(each), asked, strict=True)]
        row = by_change(edges)[name]
        assert (row["questions"], row["followed"]) == (len(asked), pytest.approx(np.mean(follows)))
        assert row["changed"] == pytest.approx(1 - np.mean(stays))


def test_edges_are_changed_for_methods_without_thoughts_too(examined: Subject) -> None:
    lm, pauses = examined.lm, replace(examined.lm.reasoning, slot=PAUSES, method="pause")
    with_pauses = LatentLM(lm.base, lm.tokenizer, lm.special, pauses)
    study = audit_edges(replace(examined, lm=with_pauses))
    assert set(by_change(study)) <= {"redirected", "removed", "removed_elsewhere"}


def test_edges_have_no_rows_if_no_answer_is_right() -> None:
    lm = build("llama", torch.float32, num_thoughts=1, max_new_tokens=2)
    study = audit_edges(Subject(lm, TASKS["prosqa"], EXAMPLES[:3]))
    assert (study.rows, study.facts["right"]) == ([], 0)
    assert study.facts["verdict"][0].startswith("It is not clear where the answer comes from")


def row(accuracy: float, half: float = 0.04, trained: float = 0.98) -> dict[str, Any]:
    """A row whose intervals are as wide as that of some hundred questions."""
    difference = accuracy - trained
    return {
        "questions": 500, "accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "neither": 0.41,
        "difference": difference, "difference_low": difference - half, "difference_high": difference + half,
    }  # fmt: skip


LOST = (0.9, 0.8, 1.0)


def rows_with(**changes: float) -> dict[str, dict[str, Any]]:
    usual = {"none": 0.98, "zeros": 0.5, "noise": 0.5, "mean": 0.52, "other": 0.4, "order": 0.9, "thought_1": 0.97,
             "thought_2": 0.7, "count_0": 0.6}  # fmt: skip
    return {name: row(value) | {"change": name} for name, value in (usual | changes).items()}


def test_share_lost_is_relative_to_the_accuracy_above_chance() -> None:
    before = np.array([True] * 180 + [False] * 20)
    after = np.array([True] * 120 + [False] * 80)
    lost = share_lost(before, after, chance_accuracy=0.5)
    assert lost
    assert lost[0] == pytest.approx((0.9 - 0.6) / (0.9 - 0.5))
    assert lost[1] < lost[0] < lost[2]
    assert share_lost(before, before, chance_accuracy=0.5) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("right", [100, 104, 90])
def test_share_lost_is_none_without_accuracy_above_chance(right: int) -> None:
    before = np.array([True] * right + [False] * (200 - right))
    assert share_lost(before, ~before, chance_accuracy=0.5) is None
    verdict = thoughts_verdict(rows_with(none=0.52), 0.5, None)
    assert len(verdict) == 1
    assert verdict[0].startswith("It is not clear")
    assert "52.0 % of 500 questions are right as trained (chance: 50.0 %)" in verdict[0]


@pytest.mark.parametrize(
    ("lost", "first"),
    [
        ((0.9, 0.8, 1.0), "The thoughts are used:"),
        ((0.5, 0.1, 0.9), "The thoughts are used:"),
        ((0.4, 0.1, 0.7), "The thoughts are used in part:"),
        ((0.6, 0.05, 1.1), "It is not clear whether the thoughts are used:"),
        ((0.05, -0.1, 0.2), "It is not clear whether the thoughts are used:"),
        ((0.05, 0.01, 0.09), "The thoughts are hardly used:"),
        ((0.0, -0.05, 0.05), "The thoughts are hardly used:"),
    ],
)
def test_verdict_depends_on_the_thoughts_of_another_question(lost: tuple[float, float, float], first: str) -> None:
    verdict = thoughts_verdict(rows_with(other=0.4), 0.5, lost)
    assert verdict[0].startswith(first)
    assert "40.0 %" in verdict[0]
    assert "98.0 % (chance: 50.0 %)" in verdict[0]


def test_verdict_sentences_agree_with_the_intervals() -> None:
    assert "chance" not in " ".join(thoughts_verdict(rows_with(), None, LOST)), "answers are open"
    falls = thoughts_verdict(rows_with(), 0.5, LOST)
    assert falls[1] == ("Their content is needed: with the mean over questions in place of each thought 52.0 % "
                        "(-46.0 points, -50.0 to -42.0), which is not clearly above chance.")  # fmt: skip
    assert "above chance" not in thoughts_verdict(rows_with(mean=0.7), 0.5, LOST)[1]
    assert "order matters: in another order 90.0 %" in falls[3]
    assert "number 2 matters most: with its mean in its place 70.0 %" in falls[4]
    stays = thoughts_verdict(rows_with(mean=0.98, order=0.97, thought_2=0.98), 0.5, LOST)
    assert stays[1].startswith("No need for their content is seen")
    assert stays[3].startswith("No effect of their order is seen")
    assert stays[4].startswith("No single thought is clearly needed; number 1")


def followed(**shares: float) -> dict[str, dict[str, Any]]:
    shares = {"redirected": 0.98, "redirected_old_thoughts": 0.03, "redirected_thoughts_only": 0.95} | shares
    rows: dict[str, dict[str, Any]] = {
        name: {"questions": 400, "followed": share, "followed_low": share - 0.02, "followed_high": share + 0.02}
        for name, share in shares.items()
    }
    return rows | {"removed": {"changed": 0.6}, "removed_elsewhere": {"changed": 0.01}}


@pytest.mark.parametrize(
    ("old", "only", "first"),
    [
        (0.03, 0.95, "The thoughts carry the answer:"),
        (0.95, 0.03, "The question carries the answer, not the thoughts:"),
        (0.95, 0.95, "Changing the thoughts or the question alone changes most answers:"),
        (0.03, 0.03, "Neither the thoughts nor the question carry the answer alone:"),
        (0.49, 0.95, "It is not clear whether the thoughts or the question carry the answer:"),
    ],
)
def test_edges_verdict_depends_on_the_exchanged_thoughts(old: float, only: float, first: str) -> None:
    verdict = edges_verdict(followed(redirected_old_thoughts=old, redirected_thoughts_only=only))
    assert verdict[0].startswith(first)
    assert f"{100 * old:.1f} % of the answers follow" in verdict[0]
    assert verdict[1].startswith("The answer follows the graph: of 400 answers, 98.0 %")
    assert "no option is right, 60.0 %" in verdict[2]
    assert "1.0 %" in verdict[3]


def test_edges_verdict_without_answers_that_follow() -> None:
    assert edges_verdict(followed(redirected=0.2))[0].startswith("The answer does not follow the graph: of 400")
    assert edges_verdict(followed(redirected=0.5))[0].startswith("It is not clear whether the answer follows")
