"""Are the thoughts used? Changed thoughts, changed graphs, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, build
from helpers.runs import graph_rows
from scipy.stats import binomtest
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.analysis.graph_paths import redirect
from coconut.analysis.interventions import (
    audit_edges,
    audit_thoughts,
    changed_thoughts,
    edges_verdict,
    others,
    share_lost,
    thoughts_verdict,
)
from coconut.analysis.probes import Subject
from coconut.analysis.statistics import difference_interval
from coconut.data.batching import collate
from coconut.data.examples import Example
from coconut.data.sequences import layout
from coconut.data.tokenization import build_word_tokenizer, encode_questions, encode_texts
from coconut.evaluation.evaluator import Evaluated
from coconut.methods import PromptFormat, Reasoning, Slot, Stage
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS, prosqa

EXAMPLES = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=6, count=24)]
THOUGHTS = 3
SUMS = [Example("1 + 1", (), "2"), Example("2 + 3", (), "5"), Example("3 + 3", (), "6")]


def asked_after_thoughts() -> LatentLM:
    """A small model that knows most of the examples by heart, asked with thoughts that it hardly needs."""
    torch.manual_seed(0)
    form = PromptFormat("{}", "{} ", "### {}")
    tokenizer = build_word_tokenizer(EXAMPLES, form)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **ARCHITECTURES["llama"])
    reasoning = Reasoning(num_thoughts=THOUGHTS, steps_cut=None, max_new_tokens=4, format=form)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)
    questions = encode_questions(tokenizer, [example.question for example in EXAMPLES], form)
    answers = encode_texts(tokenizer, [PromptFormat.fill(form.answer, example.answer) for example in EXAMPLES])
    stage = Stage(0, 1, Slot.thought, markers=True, num_thoughts=THOUGHTS, steps_cut=None)
    segments = zip(questions, ([*ids, lm.special.eos] for ids in answers), strict=True)
    batch = collate([layout(each, stage, lm.special) for each in segments], lm.special)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for _ in range(60):
        loss = lm(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


@pytest.fixture(scope="module")
def examined() -> Subject:
    return Subject(asked_after_thoughts(), TASKS["prosqa"], EXAMPLES, batch_size=16)


@pytest.fixture(scope="module")
def thoughts(examined: Subject) -> Study:
    return audit_thoughts(examined)


@pytest.fixture(scope="module")
def edges(examined: Subject) -> Study:
    return audit_edges(examined)


def by_change(study: Study) -> dict[str, dict[str, Any]]:
    return {row["change"]: row for row in study.rows}


def is_right(found: Evaluated) -> list[bool]:
    return [prediction.correct for prediction in found.predictions]


def said(found: Evaluated) -> list[str | None]:
    return [prediction.predicted for prediction in found.predictions]


def test_the_thoughts_of_the_run_give_its_answers(examined: Subject) -> None:
    assert examined.ask(thoughts=examined.baseline.thoughts).predictions == examined.baseline.predictions


def test_every_change_of_the_thoughts_is_counted(examined: Subject, thoughts: Study) -> None:
    rows = by_change(thoughts)
    assert list(rows) == ["none", "zeros", "noise", "mean", "other", "order", "thought_1", "thought_2", "thought_3",
                          "count_0", "count_1", "count_2", "count_4", "count_5"]  # fmt: skip
    usual_NKD = examined.baseline.thoughts
    mean_NKD = usual_NKD.mean(0, keepdim=True).expand_as(usual_NKD)
    without_2 = torch.stack([usual_NKD[:, 0], mean_NKD[:, 1], usual_NKD[:, 2]], dim=1)
    changes: dict[str, dict[str, Any]] = {
        "zeros": {"thoughts": 0 * usual_NKD},
        "mean": {"thoughts": mean_NKD},
        "order": {"thoughts": usual_NKD[:, [2, 0, 1]]},
        "thought_2": {"thoughts": without_2},
        "count_0": {"num_thoughts": 0},
        "count_5": {"num_thoughts": 5},
    }
    was = examined.baseline
    for name, options in changes.items():
        found, row = examined.ask(**options), rows[name]
        assert row["accuracy"] == found.result.accuracy
        assert (row["low"], row["high"]) == pytest.approx(found.result.interval)
        assert row["difference"] == pytest.approx(found.result.accuracy - was.result.accuracy)
        pair = np.array([is_right(found)]), np.array([is_right(was)])
        assert (row["difference_low"], row["difference_high"]) == difference_interval(*pair)
        changed = sum(new != old for new, old in zip(said(found), said(was), strict=True))
        interval = binomtest(changed, len(EXAMPLES)).proportion_ci(method="wilson")
        assert (row["changed"], row["changed_low"]) == (changed / len(EXAMPLES), pytest.approx(interval.low))
        assert row["questions"] == len(EXAMPLES)
        options_of = [prosqa.candidates(example.question) or [] for example in EXAMPLES]
        outside = [text not in options for text, options in zip(said(found), options_of, strict=True)]
        assert row["neither"] == sum(outside) / len(EXAMPLES)
    assert rows["none"]["accuracy"] == was.result.accuracy
    assert {rows["none"][key] for key in rows["none"] if key.startswith(("difference", "changed"))} == {0.0}
    assert len({tuple(row) for row in thoughts.rows}) == 1
    assert any(row["changed"] for row in thoughts.rows)


def test_thoughts_of_others_are_those_of_another_question_each() -> None:
    for count in (2, 3, 24):
        found = others(count)
        assert sorted(found) == list(range(count))
        assert (found != np.arange(count)).all()


def test_noise_is_as_long_as_the_thoughts_and_the_same_each_time(examined: Subject, thoughts: Study) -> None:
    usual_NKD = examined.baseline.thoughts
    changed = {name: thoughts_NKD for name, _, thoughts_NKD in changed_thoughts(usual_NKD)}
    again = {name: thoughts_NKD for name, _, thoughts_NKD in changed_thoughts(usual_NKD)}
    torch.testing.assert_close(changed["noise"].norm(dim=-1), usual_NKD.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(changed["noise"], usual_NKD, dim=-1).abs().mean() < 0.3
    assert torch.equal(changed["noise"], again["noise"])
    assert torch.equal(changed["other"], usual_NKD[others(len(EXAMPLES))])


def test_two_thoughts_change_places_and_one_cannot() -> None:
    options: dict[str, Any] = {"max_new_tokens": 2}
    for count, names in [(1, {"zeros", "noise", "mean", "other"}), (2, {"order", "thought_1", "thought_2"})]:
        lm = build("llama", torch.float32, num_thoughts=count, **options)
        rows = by_change(audit_thoughts(Subject(lm, TASKS["gsm8k"], SUMS)))
        assert names <= set(rows)
        assert ("order" in rows) == (count > 1)
        assert {name for name in rows if name.startswith("count")} == {f"count_{k}" for k in range(count + 3)} - {
            f"count_{count}"
        }


def test_a_single_question_has_no_other_thoughts() -> None:
    lm = build("llama", torch.float32, num_thoughts=2, max_new_tokens=2)
    study = audit_thoughts(Subject(lm, TASKS["gsm8k"], SUMS[:1]))
    changes = {row["change"] for row in study.rows}
    assert changes == {"none", "zeros", "noise", "order", "count_0", "count_1", "count_3", "count_4"}
    assert study.facts["verdict"][0].startswith("It cannot be told whether the thoughts are used")


def test_without_latent_thoughts_there_is_nothing_to_audit() -> None:
    lm = build("llama", torch.float32, slot=Slot.pause, method="pause", num_thoughts=2)
    with pytest.raises(NotApplicable, match="pause has no latent thoughts"):
        audit_thoughts(Subject(lm, TASKS["gsm8k"], SUMS))


# --- edges ---


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
            assert row["followed"] <= row["changed"]  # what names the other option is no longer what it was
    assert edges.facts["redirections"]["swapped"] <= rows["redirected"]["questions"]


def test_following_is_naming_the_option_that_is_now_right(examined: Subject, edges: Study) -> None:
    right = [i for i, prediction in enumerate(examined.baseline.predictions) if prediction.correct]
    found = {i: redirect(EXAMPLES[i].question, examined.asked[i], Random(f"0 {i}")) for i in right}
    questions = {i: each.question for i, each in found.items() if each}
    before, asked = [EXAMPLES[i] for i in questions], list(questions)
    turned = [replace(EXAMPLES[i], question=question) for i, question in questions.items()]
    for example in turned:
        told = prosqa.graph(example.question)
        reachable = [option for option in told.graph["options"] if networkx.has_path(told, told.graph["root"], option)]
        assert reachable == [examined.asked[EXAMPLES.index(before[turned.index(example)])].other]
    again = examined.ask(turned)
    answers = {
        "redirected": again,
        "redirected_old_thoughts": examined.ask(turned, thoughts=examined.baseline.thoughts[asked]),
        "redirected_thoughts_only": examined.ask(before, thoughts=again.thoughts),
    }
    for name, each in answers.items():
        follows = [answer == examined.asked[i].other for answer, i in zip(said(each), asked, strict=True)]
        stays = [answer == EXAMPLES[i].answer for answer, i in zip(said(each), asked, strict=True)]
        row = by_change(edges)[name]
        assert (row["questions"], row["followed"]) == (len(asked), pytest.approx(np.mean(follows)))
        assert row["changed"] == pytest.approx(1 - np.mean(stays))


def test_graphs_are_changed_for_methods_without_thoughts_too(examined: Subject) -> None:
    lm = examined.lm
    with_pauses = LatentLM(lm.base, lm.tokenizer, lm.special, replace(lm.reasoning, slot=Slot.pause, method="pause"))
    rows = by_change(audit_edges(replace(examined, lm=with_pauses)))
    assert set(rows) <= {"redirected", "removed", "removed_elsewhere"}


def test_where_no_answer_is_right_nothing_is_said_of_edges() -> None:
    lm = build("llama", torch.float32, num_thoughts=1, max_new_tokens=2)
    study = audit_edges(Subject(lm, TASKS["prosqa"], EXAMPLES[:3]))
    assert study.rows == []
    assert study.facts["right"] == 0
    assert study.facts["verdict"][0].startswith("It cannot be told where the answer comes from")


def test_edges_need_graphs() -> None:
    lm = build("llama", torch.float32, num_thoughts=1, max_new_tokens=2)
    with pytest.raises(NotApplicable, match="questions of gsm8k tell no graph"):
        audit_edges(Subject(lm, TASKS["gsm8k"], SUMS))


# --- verdicts ---


def row(accuracy: float, half: float = 0.04, trained: float = 0.98) -> dict[str, Any]:
    """A row whose intervals are as wide as that of some hundred questions."""
    return {
        "questions": 500,
        "accuracy": accuracy,
        "low": accuracy - half,
        "high": accuracy + half,
        "difference": accuracy - trained,
        "difference_low": accuracy - trained - half,
        "difference_high": accuracy - trained + half,
        "neither": 0.41,
    }


LOST = (0.9, 0.8, 1.0)


def rows_with(**changes: float) -> dict[str, dict[str, Any]]:
    usual = {"none": 0.98, "zeros": 0.5, "noise": 0.5, "mean": 0.52, "other": 0.4, "order": 0.9, "thought_1": 0.97,
             "thought_2": 0.7, "count_0": 0.6}  # fmt: skip
    return {name: row(value) | {"change": name} for name, value in (usual | changes).items()}


def test_what_is_lost_is_measured_in_what_was_above_guessing() -> None:
    before = np.array([True] * 180 + [False] * 20)
    after = np.array([True] * 120 + [False] * 80)
    found = share_lost(before, after, guess=0.5)
    assert found
    share, low, high = found
    assert share == pytest.approx((0.9 - 0.6) / (0.9 - 0.5))
    assert low < share < high
    kept = share_lost(before, before, guess=0.5)
    assert kept == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("right", [100, 104, 90])
def test_who_does_not_surely_beat_guessing_has_nothing_to_lose(right: int) -> None:
    before = np.array([True] * right + [False] * (200 - right))
    assert share_lost(before, ~before, guess=0.5) is None
    verdict = thoughts_verdict(rows_with(none=0.52), 0.5, None)
    assert len(verdict) == 1
    assert verdict[0].startswith("It cannot be told")
    assert "52.0 % of 500 questions are right as trained, where guessing gives 50.0 %" in verdict[0]


@pytest.mark.parametrize(
    ("lost", "first"),
    [
        ((0.9, 0.8, 1.0), "The thoughts are used:"),
        ((0.5, 0.1, 0.9), "The thoughts are used:"),
        ((0.4, 0.1, 0.7), "The thoughts are used in part:"),
        ((0.6, 0.05, 1.1), "It cannot be told whether the thoughts are used:"),
        ((0.05, -0.1, 0.2), "It cannot be told whether the thoughts are used:"),
        ((0.05, 0.01, 0.09), "The thoughts are hardly used:"),
        ((0.0, -0.05, 0.05), "The thoughts are hardly used:"),
    ],
)
def test_the_thoughts_of_others_decide(lost: tuple[float, float, float], first: str) -> None:
    verdict = thoughts_verdict(rows_with(other=0.4), 0.5, lost)
    assert verdict[0].startswith(first)
    assert "40.0 %" in verdict[0]
    assert "98.0 %, where guessing gives 50.0 %" in verdict[0]


def test_where_answers_are_open_guessing_is_not_spoken_of() -> None:
    verdict = thoughts_verdict(rows_with(), None, LOST)
    assert verdict[0].startswith("The thoughts are used:")
    assert "guessing" not in " ".join(verdict)


def test_each_sentence_says_what_its_numbers_say() -> None:
    falls = thoughts_verdict(rows_with(), 0.5, LOST)
    assert falls[1] == ("Their content is needed: with the mean over questions in place of each thought 52.0 % "
                        "(-46.0 points, -50.0 to -42.0), which is not surely better than guessing.")  # fmt: skip
    assert "better than guessing" not in thoughts_verdict(rows_with(mean=0.7), 0.5, LOST)[1]
    assert "order matters: in another order 90.0 %" in falls[3]
    assert "number 2 is missed most: with its mean in its place 70.0 %" in falls[4]
    stays = thoughts_verdict(rows_with(mean=0.98, order=0.97, thought_2=0.98), 0.5, LOST)
    assert stays[1].startswith("That their content is needed is not seen")
    assert stays[3].startswith("That their order matters is not seen")
    assert stays[4].startswith("No single thought is surely missed; number 1")


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
        (0.95, 0.03, "The thoughts do not carry the answer, the question itself is read:"),
        (0.95, 0.95, "Either of them alone turns most answers:"),
        (0.03, 0.03, "Neither thoughts nor question carry the answer alone:"),
        (0.49, 0.95, "It cannot be told whether thoughts or question carry the answer:"),
    ],
)
def test_old_thoughts_and_new_ones_decide_what_carries_the_answer(old: float, only: float, first: str) -> None:
    verdict = edges_verdict(followed(redirected_old_thoughts=old, redirected_thoughts_only=only))
    assert verdict[0].startswith(first)
    assert f"{100 * old:.1f} % of the answers follow" in verdict[0]
    assert verdict[1].startswith("The answer follows the graph: of 400 answers, 98.0 %")
    assert "no option is right, 60.0 %" in verdict[2]
    assert "1.0 %" in verdict[3]


def test_an_answer_that_does_not_follow_the_graph_is_carried_by_nothing() -> None:
    assert edges_verdict(followed(redirected=0.2))[0].startswith("The answer does not follow the graph: of 400")
    assert edges_verdict(followed(redirected=0.5))[0].startswith("It cannot be told whether the answer follows")
