"""Accuracy under noise on thoughts, pauses and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.memorizing import EXAMPLES, memorizing_model, word_model

from coconut.analysis import noise
from coconut.analysis.noise import SIGMAS, noise_curves, noisy_embeddings
from coconut.analysis.probes import Subject
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import evaluate
from coconut.generation.generate import pad_rows
from coconut.methods import METHODS, NOTHING, PAUSES
from coconut.reporting.measurements.noise import describe
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(memorizing_model(), TASKS["prosqa"], EXAMPLES, batch_size=16)


def test_rows_do_not_depend_on_the_batch(subject: Subject) -> None:
    study = noise_curves(subject)
    again = noise_curves(Subject(subject.lm, subject.task, EXAMPLES, batch_size=5))
    assert study.rows == again.rows
    assert [(row["where"], row["sigma"]) for row in study.rows] == [
        (where, sigma) for where in ("thoughts", "words") for sigma in (0.0, *SIGMAS)
    ]
    assert study.rows[0]["accuracy"] == subject.baseline.result.accuracy


def test_thoughts_get_noise_of_their_own_dispersion(subject: Subject) -> None:
    thoughts_NKD = subject.baseline.thoughts
    by_hand = [[float(thoughts_NKD[:, k, d].var(unbiased=False)) for d in range(thoughts_NKD.shape[2])]
               for k in range(thoughts_NKD.shape[1])]  # fmt: skip
    std = float(torch.tensor(by_hand).mean().sqrt())
    facts = noise_curves(subject).facts
    assert facts["dispersion"]["thoughts"] == pytest.approx(std, rel=1e-5)
    noisy = evaluate(subject.lm, subject.task, EXAMPLES, thought_noise=0.1 * std, batch_size=7)
    added = noisy.thoughts[:, 0] - thoughts_NKD[:, 0]  # later ones are computed from noisy ones
    assert float(added.std()) == pytest.approx(0.1 * std, rel=0.1)
    again = evaluate(subject.lm, subject.task, EXAMPLES, thought_noise=0.1 * std)
    assert torch.allclose(again.thoughts, noisy.thoughts, atol=1e-5), "another batch size"


def test_noise_on_words_hits_as_many_words_and_nothing_else(subject: Subject) -> None:
    lm = subject.lm
    rows = encode_questions(lm.tokenizer, [e.question for e in EXAMPLES[:4]], lm.reasoning.format)
    ids_BT, mask_BT = pad_rows([[*row, lm.special.bot] for row in rows], lm.special.pad)
    table = lm.base.get_input_embeddings()
    with torch.no_grad():
        before = table(ids_BT)
        with noisy_embeddings(lm, 0.5, noise._some_words(lm, 3)):
            after, single = table(ids_BT), table(ids_BT[:, -1:])
        assert torch.equal(table(ids_BT), before)
    assert torch.equal(single, before[:, -1:]), "words that are generated stay"
    changed_BT = (after != before).any(-1)
    assert changed_BT.sum(1).tolist() == [3] * 4
    assert not (changed_BT & (mask_BT == 0)).any()
    assert not (changed_BT & (ids_BT == lm.special.bot)).any()
    assert float((after - before)[changed_BT].std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("changes", [{"method": "c_mtp"}, {"method": "soft_coconut", "top_k": 3}])
def test_noise_on_words_leaves_those_that_a_thought_is_made_of(changes: dict[str, Any]) -> None:
    """C-MTP looks up the words of a group, and a mixture its likeliest words, several columns at once."""
    torch.manual_seed(0)
    lm = word_model(EXAMPLES, 2)
    slot = replace(METHODS[changes["method"]].slot, **{key: value for key, value in changes.items() if key != "method"})
    lm.reasoning = replace(lm.reasoning, slot=slot)
    lm.feedback = lm.new_feedback(slot)
    states_BD = torch.randn(4, lm.thought_size)
    ids_BT = torch.tensor(encode_questions(lm.tokenizer, [EXAMPLES[0].question], lm.reasoning.format))
    with torch.no_grad():
        own_BD, embeds_BTD = lm.thought(states_BD), lm.embed(ids_BT)
        with noisy_embeddings(lm, 0.5, noise._some_words(lm, 3)):
            assert torch.equal(lm.thought(states_BD), own_BD)
            assert not torch.equal(lm.embed(ids_BT), embeds_BTD)
        assert torch.equal(lm.embed(ids_BT), embeds_BTD)
    assert "thought" not in vars(lm)


def test_pauses_get_noise_on_their_embeddings(subject: Subject) -> None:
    lm = memorizing_model()
    lm.reasoning = replace(lm.reasoning, slot=PAUSES)
    study = noise_curves(Subject(lm, TASKS["prosqa"], EXAMPLES, batch_size=16))
    assert {row["where"] for row in study.rows} == {"pauses", "words"}
    assert study.facts["dispersion"]["thoughts"] is None
    lm.reasoning = replace(lm.reasoning, slot=NOTHING, num_thoughts=0)
    with pytest.raises(NotApplicable, match="nothing in its slot to which noise could be added"):
        noise_curves(Subject(lm, TASKS["prosqa"], EXAMPLES))


def test_a_model_that_ignores_its_thoughts_bears_any_noise_on_them() -> None:
    """Its attention is cut: what follows the thoughts does not see them."""
    lm = memorizing_model()
    ignoring = Subject(lm, TASKS["prosqa"], EXAMPLES, batch_size=16)
    lm.feedback.forward = lambda states, words: torch.zeros_like(states)  # pyright: ignore
    study = noise_curves(ignoring)
    assert study.facts["dispersion"]["thoughts"] == 0.0
    own = [row["accuracy"] for row in study.rows if row["where"] == "thoughts"]
    assert len(set(own)) == 1


def test_the_sentences_follow_the_intervals() -> None:
    def rows(where: str, values: list[float]) -> list[dict[str, object]]:
        return [{"where": where, "sigma": sigma, "questions": 500, "accuracy": value, "low": value - 0.03,
                 "high": value + 0.03} for sigma, value in zip((0.0, 1.0, 2.0), values, strict=True)]  # fmt: skip

    study = Study("noise", [*rows("thoughts", [0.95, 0.93, 0.5]), *rows("words", [0.95, 0.94, 0.93])])
    first, second, _ = describe(study)
    assert "falls clearly from size 2 on, from 95.0 % to 50.0 %" in first
    assert "no clear fall is seen up to size 2: 93.0 % instead of 95.0 %" in second
