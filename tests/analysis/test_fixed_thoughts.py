"""Models that decide by themselves how they think are measured with equally many thoughts in every question."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from helpers.memorizing import EXAMPLES, FORM, word_model
from helpers.models import EXAMPLES as ASKED
from helpers.models import hybrid
from torch import Tensor

from coconut import LatentLM
from coconut.analysis.fixed_thoughts import FixedThoughts, with_fixed_thoughts
from coconut.analysis.geometry import geometry
from coconut.analysis.graph_paths import redirect
from coconut.analysis.influence import influence
from coconut.analysis.interventions import audit_edges, audit_thoughts, other_questions
from coconut.analysis.noise import noise_curves
from coconut.analysis.prefix_values import prefix_values
from coconut.analysis.probes import Subject, decoded, inner_products, k_forcing, next_step_values
from coconut.analysis.readout import _questions as questions_to_read
from coconut.analysis.rollouts import sampled
from coconut.analysis.states import slot_states
from coconut.data.examples import Example
from coconut.data.tokenization import encode_answers
from coconut.evaluation.config import Sampling
from coconut.evaluation.sampling import evaluate_samples
from coconut.generation.room import room_for_question
from coconut.methods import METHODS, Reasoning
from coconut.runs.study import NotApplicable
from coconut.tasks import TASKS
from coconut.tasks.chain import read_answer

ENDS = {"colar": (0.2, 29), "c_mtp": (0.3, 40)}  # of `<eot>` in the head, such that thoughts end at different times
MERGING = [name for name, method in METHODS.items() if method.slot.merges]
TASK = TASKS["prosqa"]


@cache
def ending_model(method: str) -> LatentLM:
    """A model with new weights that ends its thoughts after different numbers of them."""
    torch.manual_seed(0)
    lm = word_model(EXAMPLES, num_thoughts=5)
    slot = METHODS[method].slot
    lm.add_rates(slot.max_group, "random")
    lm.reasoning = Reasoning(method, 0, slot, num_thoughts=5, thoughts_per_step=0, steps_cut=None, max_new_tokens=3,
                             format=FORM)  # fmt: skip
    lm.feedback = lm.new_feedback(slot)
    head: Any = lm.base.get_output_embeddings()
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        scale, seed = ENDS[method]
        head.weight[lm.special.eot] = scale * torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return lm.requires_grad_(False).eval()


def subject_of(method: str, batch_size: int = 5) -> Subject:
    return Subject(ending_model(method), TASK, EXAMPLES, batch_size=batch_size)


def fixed_of(method: str) -> FixedThoughts:
    return with_fixed_thoughts(subject_of(method))


def prompt_of(subject: Subject, example: Example) -> list[int]:
    """A question with the token before its slot."""
    lm = subject.lm
    begin = lm.special.rates[lm.reasoning.slot.group - 1] if lm.special.rates else lm.special.bot
    return [*subject.encode([example])[0], begin]


def states_of(lm: LatentLM, embeds: list[Tensor]) -> Tensor:
    return lm.base.base_model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]


@torch.no_grad()
def slow_thoughts(subject: Subject, example: Example, count: int) -> tuple[list[Tensor], list[Tensor], int]:
    """So many thoughts and the states before them, everything run again for each; where the model would have ended."""
    lm = subject.lm
    inputs, thoughts, states, end = [*lm.embed(torch.tensor(prompt_of(subject, example)))], [], [], count
    for k in range(count):
        states.append(states_of(lm, inputs)[-1])
        if lm.reasoning.slot.merges and bool(lm.feedback.ends(states[-1][None], lm)) and end == count:
            end = k
        thoughts.append(lm.thought(states[-1][None])[0])
        inputs.append(thoughts[-1])
    return thoughts, states, end


def answer_alone(subject: Subject, example: Example, thoughts: list[Tensor]) -> str | None:
    """The greedy answer after these thoughts, everything run again for each word."""
    lm = subject.lm
    inputs = [*lm.embed(torch.tensor(prompt_of(subject, example))), *thoughts]
    inputs.append(lm.embed(torch.tensor(lm.special.eot)))
    words: list[int] = []
    while len(words) < lm.reasoning.max_new_tokens:
        logits = lm.logits(states_of(lm, inputs)[-1])
        logits[lm.special.added] = -torch.inf
        word = int(logits.argmax())
        if word == lm.special.eos:
            break
        words.append(word)
        inputs.append(lm.embed(torch.tensor(word)))
    return read_answer(str(lm.tokenizer.decode(words)), FORM)


@pytest.mark.parametrize("method", MERGING)
def test_the_most_common_number_of_thoughts_is_fixed(method: str) -> None:
    subject, fixed = subject_of(method), fixed_of(method)
    counts = [slow_thoughts(subject, example, 5)[2] for example in EXAMPLES]
    positive = Counter(count for count in counts if count)
    assert len(positive) > 2, "otherwise little is chosen"
    alike = fixed.facts["alike"]
    assert alike["thoughts"] == min(positive, key=lambda count: (-positive[count], count))
    assert fixed.chosen == [i for i, count in enumerate(counts) if count == alike["thoughts"]]
    assert alike == {"thoughts": alike["thoughts"], "questions": len(fixed.chosen), "of": len(EXAMPLES)}
    assert fixed.subject.baseline.predictions == [subject.baseline.predictions[i] for i in fixed.chosen]
    assert fixed.subject.with_this_count(EXAMPLES) == fixed.chosen
    assert subject.lm.reasoning.num_thoughts == 5
    assert not subject.lm.reasoning.fixed_count


@pytest.mark.parametrize("method", MERGING)
def test_interventions_equal_asking_each_question_alone(method: str) -> None:
    subject = fixed_of(method).subject
    K, N = subject.num_trained_thoughts, len(subject.examples)
    own = [slow_thoughts(subject, example, K + 2)[0] for example in subject.examples]
    zeros, other = torch.zeros_like(own[0][0]), other_questions(N)
    means = [torch.stack([thoughts[k] for thoughts in own]).mean(0) for k in range(K)]
    fed = {
        "none": [thoughts[:K] for thoughts in own], "zeros": [[zeros] * K for _ in own], "mean": [means for _ in own],
        "other": [own[i][:K] for i in other], "order": [[thoughts[K - 1], *thoughts[: K - 1]] for thoughts in own],
        **{f"count_{k}": [thoughts[:k] for thoughts in own] for k in range(K + 3) if k != K},
    }  # fmt: skip
    answers = {
        name: [answer_alone(subject, *pair) for pair in zip(subject.examples, thoughts, strict=True)]
        for name, thoughts in fed.items()
    }
    rows = {row["change"]: row for row in audit_thoughts(subject).rows}
    assert set(rows) - set(fed) <= {"noise", *(f"thought_{k + 1}" for k in range(K))}
    for name in fed.keys() & rows.keys():
        changed = sum(new != old for new, old in zip(answers[name], answers["none"], strict=True))
        right = sum(TASK.judge(a, e.answer) for a, e in zip(answers[name], subject.examples, strict=True))
        assert (rows[name]["questions"], rows[name]["changed"]) == (N, changed / N)
        assert rows[name]["accuracy"] == right / N
    assert {row["thoughts"] for row in k_forcing(subject).rows} == set(range(K + 3))
    if K < 5:
        beyond_ND = subject.forced(K + 1).thoughts[:, K]
        assert bool(beyond_ND.any()) == (method != "c_mtp"), "a group without words is zero"


@pytest.mark.parametrize("method", MERGING)
def test_every_study_has_the_thoughts_that_are_computed_one_by_one(method: str) -> None:
    subject = fixed_of(method).subject
    lm, K, last = subject.lm, subject.num_trained_thoughts, len(subject.examples) - 1
    own = [slow_thoughts(subject, example, K)[0] for example in subject.examples]
    states_NPLD = slot_states(lm, subject.question_ids, batch_size=3)
    for i in (0, last):
        torch.testing.assert_close(states_NPLD[i, 1:, 0], torch.stack(own[i]), rtol=1e-4, atol=1e-5)
    first_norms = torch.stack([thoughts[0] for thoughts in own]).norm(dim=1)
    row = geometry(subject)[0].rows[0]
    assert row["norm"] == pytest.approx(float(first_norms.mean()), rel=1e-4)

    answers, _ = encode_answers(lm.tokenizer, [example.answer for example in subject.examples], FORM)
    values = prefix_values(subject)
    for k in range(K + 1):
        expected = 0.0
        for example, thoughts, answer in zip(subject.examples, own, answers, strict=True):
            words = lm.embed(torch.tensor([lm.special.eot, *answer]))
            inputs = [*lm.embed(torch.tensor(prompt_of(subject, example))), *thoughts[:k], *words]
            logits = lm.logits(states_of(lm, inputs)[-len(words) : -1])
            logits[:, lm.special.added] = -torch.inf
            expected += float(logits.log_softmax(-1)[range(len(answer)), answer].sum()) / len(answers)
        (found,) = [row for row in values.rows if (row["of"], row["thoughts"], row["steps"]) == ("answer", k, None)]
        assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert values.facts["warning"].startswith(f"The model ends its thoughts itself, after {K} in these questions.")

    study = influence(subject)
    assert study.facts["units"] == {"thoughts": K}
    answers_kept = [row for row in study.rows if (row["unit"], row["change"], row["on"]) == (K, "zeros", None)]
    assert {row["later"] for row in answers_kept} == {"kept", "recomputed"}
    assert len({row["kl"] for row in answers_kept if not row["control"]}) == 1, "nothing comes after the last one"


@pytest.mark.parametrize("method", MERGING)
def test_under_noise_the_number_stays(method: str) -> None:
    subject = fixed_of(method).subject
    K = subject.num_trained_thoughts
    assert {p.num_thoughts for p in subject.ask(thought_noise=3.0).predictions} == {K}
    free = replace(subject, lm=subject.lm.with_reasoning(replace(subject.lm.reasoning, fixed_count=False)))
    assert {p.num_thoughts for p in free.ask(thought_noise=3.0).predictions} != {K} or K == 1
    assert {row["questions"] for row in noise_curves(subject).rows} == {len(subject.examples)}


@pytest.mark.parametrize("method", MERGING)
def test_what_is_said_in_the_place_of_a_thought_is_read_before_it(method: str) -> None:
    subject = fixed_of(method).subject
    lm, study = subject.lm, decoded(subject, count=3)
    assert study.facts == {"read": "states before"}
    for question, example in enumerate(subject.examples[:3]):
        _, states, _ = slow_thoughts(subject, example, subject.num_trained_thoughts)
        for thought, state in enumerate(states, 1):
            read = lm.feedback.projector(state)[0] if method == "c_mtp" else state
            probabilities = lm.logits(read).double().softmax(-1)
            never = [token for token in lm.special.added if token != lm.special.eot]
            probabilities[never] = 0
            best = probabilities.max() / probabilities.sum()
            (row,) = [
                row for row in study.rows if (row["question"], row["thought"], row["rank"]) == (question, thought, 1)
            ]
            assert row["probability"] == pytest.approx(float(best), rel=1e-4)
            assert row["token"] == lm.tokenizer.decode([int(probabilities.argmax())])


def test_changed_graphs_with_another_number_of_thoughts_are_left_out() -> None:
    lm = ending_model("c_mtp")
    agreeing: Any = _Agreeing()
    fixed = with_fixed_thoughts(Subject(lm, agreeing, EXAMPLES, batch_size=5)).subject
    edges = audit_edges(fixed)
    changed = [
        replace(example, question=change.question)
        for i, example in enumerate(fixed.examples) if (change := redirect(fixed.graphs[i], Random(f"0 {i}")))
    ]  # fmt: skip
    counts = [slow_thoughts(fixed, example, 5)[2] for example in changed]
    kept = counts.count(fixed.num_trained_thoughts)
    assert 0 < kept < len(changed)
    assert edges.facts["right"] == len(fixed.examples)
    rows = {row["change"]: row for row in edges.rows}
    assert {rows[name]["questions"] for name in rows if name.startswith("redirected")} == {kept}
    assert edges.facts["left_out"]["redirected"] == len(fixed.examples) - kept


class _Agreeing:
    """prosqa, with a judge who takes every answer for right."""

    def __getattr__(self, name: str) -> Any:
        return getattr(TASK, name)

    def judge(self, predicted: str | None, gold: str) -> bool:
        return True


def test_questions_to_fit_on_have_room_for_the_thoughts_that_the_model_may_take() -> None:
    fixed = fixed_of("c_mtp").subject
    lm, example = fixed.lm, EXAMPLES[0]
    words = example.question.split()
    longest = room_for_question(lm)
    training = [
        Example(" ".join(words[i % len(words)] for i in range(length)), example.steps, example.answer)
        for length in (20, longest - 5, longest)
    ]
    assert [len(ids) for ids in fixed.encode(training)] == [20, longest - 5, longest]
    assert fixed.free
    assert room_for_question(fixed.free) < longest
    fitted, _ = questions_to_read(fixed, training)
    assert fitted == [training[i] for i in fixed.with_this_count(training[:2])]


def test_a_model_that_never_begins_to_think_is_not_measured() -> None:
    lm = ending_model("colar")
    silent = lm.with_reasoning(replace(lm.reasoning, fixed_count=True, num_thoughts=0))
    assert with_fixed_thoughts(Subject(silent, TASK, EXAMPLES)).facts == {}
    short = [example for example in EXAMPLES if slow_thoughts(subject_of("colar"), example, 5)[2] == 0]
    assert short, "some questions get no thought"
    with pytest.raises(NotApplicable, match="ends its thoughts before the first one, in all questions"):
        with_fixed_thoughts(Subject(lm, TASK, short))


def test_a_hybrid_model_is_measured_in_its_mode_with_the_most_thoughts() -> None:
    lm = hybrid("gpt2", torch.float32)
    subject = Subject(lm, TASK, ASKED, batch_size=2)
    fixed = with_fixed_thoughts(subject)
    assert (fixed.facts, fixed.chosen) == ({"mode": "latent_2"}, [0, 1, 2])
    assert lm.reasoning.modes, "the model itself stays as it is"
    for example, found, thoughts_KD in zip(
        ASKED, fixed.subject.baseline.predictions, fixed.subject.baseline.thoughts, strict=True
    ):
        alone = lm.generate(torch.tensor(subject.encode([example])), mode="latent_2")
        assert (found.text, found.num_thoughts) == (alone.texts[0], 2)
        torch.testing.assert_close(thoughts_KD, alone.thoughts[0], rtol=1e-4, atol=1e-5)
    assert {row["thoughts"] for row in k_forcing(fixed.subject).rows} == {0, 1, 2, 3, 4}
    assert influence(fixed.subject).facts["units"] == {"thoughts": 2}
    draws = Sampling(32, 1.0, seed=0)
    theirs = evaluate_samples(lm, TASK, ASKED, draws, mode="latent_2", max_new_tokens=3).questions
    ours = sampled(fixed.subject, 2, max_new_tokens=3)
    for own, its in zip(ours, theirs, strict=True):
        assert [answer["text"] for answer in own] == [answer["text"] for answer in its.answers]


def test_a_hybrid_model_without_thoughts_is_not_measured() -> None:
    lm = hybrid("gpt2", torch.float32)
    lm = lm.with_reasoning(replace(lm.reasoning, modes=("short", "think")))
    with pytest.raises(NotApplicable, match="among the modes short, think, and none of them has thoughts"):
        with_fixed_thoughts(Subject(lm, TASK, ASKED))


@pytest.mark.parametrize("method", ["coconut", "pause", "cot"])
def test_other_models_stay_as_they_are(method: str) -> None:
    lm = word_model(EXAMPLES, 3)
    lm.reasoning = replace(lm.reasoning, method=method, slot=METHODS[method].slot)
    subject = Subject(lm, TASK, EXAMPLES)
    assert with_fixed_thoughts(subject) == FixedThoughts(subject, list(range(len(EXAMPLES))))


@pytest.mark.parametrize("method", ["soft_coconut", "lt_tuning"])
def test_mixtures_of_words_are_measured_as_thoughts(method: str) -> None:
    lm = word_model(EXAMPLES, 2)
    lm.reasoning = replace(lm.reasoning, method=method, slot=METHODS[method].slot)
    lm.feedback = lm.new_feedback(lm.reasoning.slot)
    subject = Subject(lm.requires_grad_(False).eval(), TASK, EXAMPLES[:8], batch_size=3)
    thoughts_NKD = subject.baseline.thoughts
    for example, thoughts_KD in zip(subject.examples, thoughts_NKD, strict=True):
        torch.testing.assert_close(
            thoughts_KD, torch.stack(slow_thoughts(subject, example, 2)[0]), rtol=1e-4, atol=1e-5
        )
    assert subject.ask(thoughts=thoughts_NKD).predictions == subject.baseline.predictions
    torch.testing.assert_close(
        slot_states(lm, subject.question_ids, batch_size=3)[:, 1:, 0], thoughts_NKD, rtol=1e-4, atol=1e-5
    )
    assert {row["after"] for row in next_step_values(subject)[0].rows} == {0, 1, 2}
    assert {row["thought"] for row in inner_products(subject).rows} == {1, 2}
    assert influence(subject).facts["units"] == {"thoughts": 2}
    with pytest.raises(NotApplicable, match="input embeddings, not states"):
        decoded(subject)
