"""Soft Thinking at inference: mixtures of words in place of a written chain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.memorizing import EXAMPLES, FORM, update, word_model
from helpers.models import QUESTIONS, build, byte_level_tokenizer, hybrid, padded
from torch import Tensor

from coconut import LatentLM
from coconut.config import EngineConfig
from coconut.data.batching import collate
from coconut.data.sequences import layout
from coconut.data.tokenization import answer_mark_ids, encode_questions, encode_texts
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.evaluator import evaluate
from coconut.evaluation.record import non_default_settings
from coconut.generation.config import GenerateConfig, SoftThinking
from coconut.generation.room import room_for_question
from coconut.methods import NOTHING, Form, PromptFormat, Reasoning
from coconut.tasks import TASKS

ONE_WORD = SoftThinking(max_thoughts=24, top_k=1)
MARKED = PromptFormat("{}", "{} ", "7 {}")  # with a mark among the words of the small models


@pytest.fixture(scope="module")
def cot() -> LatentLM:
    """A model that has memorized how to write the chains of the examples."""
    torch.manual_seed(0)
    lm = word_model(EXAMPLES, 0)
    lm.reasoning = Reasoning("cot", slot=NOTHING, markers=False, max_new_tokens=32, format=FORM)
    questions = encode_questions(lm.tokenizer, [example.question for example in EXAMPLES], FORM)
    rows = []
    for question, example in zip(questions, EXAMPLES, strict=True):
        texts = [PromptFormat.fill(FORM.step, step) for step in example.steps]
        *steps, answer = encode_texts(lm.tokenizer, [*texts, PromptFormat.fill(FORM.answer, example.answer)])
        rows.append(layout([question, *steps, [*answer, lm.special.eos]], Form(NOTHING, False, 0, 0), lm.special))
    batch = collate(rows, lm.special)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for _ in range(60):
        update(lm, optimizer, batch)
    return lm.eval()


def asked(lm: LatentLM) -> list[list[int]]:
    return encode_questions(lm.tokenizer, [example.question for example in EXAMPLES], lm.reasoning.format)


def test_with_one_word_a_thought_answers_equal_greedy_decoding(cot: LatentLM) -> None:
    ids, mask = padded(asked(cot))
    written = cot.generate(ids, mask)
    soft = cot.generate(ids, mask, soft_thinking=ONE_WORD)
    table: Any = cot.base.get_input_embeddings()
    marked = 0
    for row, (text, answer) in enumerate(zip(written.texts, soft.texts, strict=True)):
        if "###" not in text:
            continue
        marked += 1
        chain, _, rest = text.partition("###")
        assert answer.partition("###") == ("", "###", rest)
        words = encode_texts(cot.tokenizer, [chain])[0]
        assert soft.num_thoughts[row] == len(words)
        assert torch.equal(soft.thoughts[row, : len(words)], table(torch.tensor(words)).detach())
        assert soft.passes[row] == written.passes[row], "each thought is a pass, as a word is, and so is the mark"
        assert soft.lengths[row] == written.lengths[row] - len(words) - 1
    assert marked > len(EXAMPLES) / 2
    assert len(set(soft.num_thoughts.tolist())) > 1


def slowly(lm: LatentLM, question: list[int], settings: SoftThinking) -> tuple[list[Tensor], list[int]]:
    """The thoughts of one question and its answer, everything run again for every position."""
    table: Any = lm.base.get_input_embeddings()
    embeds, thoughts, low = list(table(torch.tensor(question)).detach()), [], 0
    mark = answer_mark_ids(lm.tokenizer, lm.reasoning.format)

    def scores() -> Tensor:
        states = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state
        logits_V = lm.logits(states[0, -1]).detach()
        logits_V[lm.special.added] = -torch.inf
        return logits_V

    while len(thoughts) < settings.max_thoughts:
        logits_V = scores()
        probabilities = logits_V.softmax(-1)
        entropy = -sum(float(p) * math.log(p) for p in probabilities if p > 0)
        low = low + 1 if entropy < settings.entropy else 0
        if int(logits_V.argmax()) in (mark[0], lm.special.eos) or (settings.entropy and low >= settings.patience):
            break
        kept = logits_V.argsort(descending=True)[: settings.top_k or None]
        sharper = probabilities[kept] ** (1 / settings.temperature)
        thoughts.append((sharper / sharper.sum()) @ table(kept).detach())
        embeds.append(thoughts[-1])
    embeds += list(table(torch.tensor(mark)).detach())
    new: list[int] = []
    while len(new) < lm.reasoning.max_new_tokens and (word := int(scores().argmax())) != lm.special.eos:
        new.append(word)
        embeds.append(table(torch.tensor(word)).detach())
    return thoughts, new


@pytest.mark.parametrize(
    "settings",
    [
        SoftThinking(max_thoughts=6, top_k=4, temperature=0.7),
        SoftThinking(max_thoughts=5, top_k=0),
        SoftThinking(max_thoughts=8, top_k=0, temperature=3.0, entropy=2.2, patience=2),
    ],
)
def test_equals_a_slow_reading_alone_and_in_a_batch(settings: SoftThinking, family: str) -> None:
    lm = build(family, slot=NOTHING, markers=False, max_new_tokens=4, format=MARKED)
    expected = [slowly(lm, question, settings) for question in QUESTIONS]
    alone = [lm.generate(torch.tensor([question]), soft_thinking=settings) for question in QUESTIONS]
    for right in (False, True):
        out = lm.generate(*padded(QUESTIONS, right), soft_thinking=settings)
        assert out.num_thoughts.tolist() == [len(thoughts) for thoughts, _ in expected]
        assert out.texts == [one.texts[0] for one in alone]
        for row, (thoughts, new) in enumerate(expected):
            assert out.tokens[row, : int(out.lengths[row])].tolist() == new
            assert out.passes[row] == len(thoughts) + 1 + len(new) + (not out.truncated[row])
            if thoughts:
                torch.testing.assert_close(out.thoughts[row, : len(thoughts)], torch.stack(thoughts).float())


def test_cold_stop_ends_thoughts_that_would_go_on() -> None:
    lm = build("llama", slot=NOTHING, markers=False, max_new_tokens=2, format=MARKED)
    counts = {}
    for entropy, patience in ((0.0, 1), (99.0, 1), (99.0, 3)):
        settings = SoftThinking(max_thoughts=5, top_k=0, temperature=4.0, entropy=entropy, patience=patience)
        counts[entropy, patience] = lm.generate(*padded(QUESTIONS), soft_thinking=settings).num_thoughts
    assert counts[99.0, 1].tolist() == [0] * len(QUESTIONS)
    assert counts[99.0, 3].tolist() == counts[0.0, 1].clamp(max=2).tolist()
    assert counts[0.0, 1].max() == 5


def test_samples_and_keys_of_the_answer(cot: LatentLM) -> None:
    ids, mask = padded(asked(cot)[:3])
    keys = [(0, row, number) for row in range(3) for number in range(2)]
    words = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2, "random_keys": keys}
    out = cot.generate(ids, mask, soft_thinking=ONE_WORD, log_probs=True, **words)
    assert len(out.texts) == 6
    assert out.log_probs is not None
    assert [len(each) for each in out.log_probs] == (out.lengths + ~out.truncated).tolist()


def test_evaluation_reads_the_answers_and_looks_for_no_chain(cot: LatentLM) -> None:
    task = TASKS["prosqa"]
    written = evaluate(cot, task, EXAMPLES, batch_size=7)
    soft = evaluate(cot, task, EXAMPLES, batch_size=7, soft_thinking=ONE_WORD)
    for one, other in zip(written.predictions, soft.predictions, strict=True):
        assert one.predicted is None or one.predicted == other.predicted
    assert soft.result.chain_match is None
    assert soft.result.num_thoughts > 1
    assert soft.result.accuracy >= written.result.accuracy > 0.5


def test_the_mark_is_encoded_as_it_stands_before_any_answer(cot: LatentLM) -> None:
    assert cot.tokenizer.decode(answer_mark_ids(cot.tokenizer, FORM)) == "###"
    tokenizer = byte_level_tokenizer()
    for template, mark in (("### {}", "###"), ("The answer is: {}", "The answer is:"), ("{}", ""), ("\n{}", "")):
        ids = answer_mark_ids(tokenizer, PromptFormat("{}", "{} ", template))
        assert tokenizer.decode(ids) == mark
        whole = encode_texts(tokenizer, [template.format("cat")])[0]
        assert whole[: len(ids)] == ids


def test_the_room_for_a_question_counts_thoughts_and_mark(cot: LatentLM) -> None:
    room = room_for_question(cot, soft=ONE_WORD)
    assert room == room_for_question(cot) - 25
    ids = torch.full((1, room), 9)
    assert len(cot.generate(ids, soft_thinking=ONE_WORD).texts) == 1
    with pytest.raises(ValueError, match="or with fewer thoughts"):
        cot.generate(torch.full((1, room + 1), 9), soft_thinking=ONE_WORD)


def test_settings_are_checked_and_named() -> None:
    config = EvaluateConfig(run="r", soft_thinking=SoftThinking(max_thoughts=64, top_k=1, entropy=0.1, patience=5))
    assert non_default_settings(config, None) == ["soft_thinking-max_thoughts-64-top_k-1-entropy-0.1-patience-5"]
    assert non_default_settings(EvaluateConfig(run="r"), None) == []
    assert EvaluateConfig(run="r", engine=EngineConfig()).soft is None
    with pytest.raises(ValueError, match=r"soft_thinking\.top_k=3 is given, but soft_thinking\.max_thoughts is 0"):
        SoftThinking(top_k=3)
    with pytest.raises(ValueError, match=r"soft_thinking\.patience=4 counts steps"):
        SoftThinking(max_thoughts=3, patience=4)
    with pytest.raises(ValueError, match=r"soft_thinking\.temperature is 0\.0"):
        SoftThinking(max_thoughts=3, temperature=0.0)
    with pytest.raises(ValueError, match=r"soft_thinking=.* and policy=p are both given"):
        GenerateConfig(run="r", policy="p", soft_thinking=ONE_WORD)
    with pytest.raises(ValueError, match="reward=w and soft_thinking are both given"):
        EvaluateConfig(run="r", reward="w", samples=4, temperature=1.0, soft_thinking=ONE_WORD)


def test_what_cannot_be_is_refused() -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="has latent thoughts of its own"):
        build("gpt2").generate(ids, soft_thinking=ONE_WORD)
    with pytest.raises(ValueError, match="has the modes short, think, latent_2"):
        hybrid().generate(ids, soft_thinking=ONE_WORD)
    unmarked = build("gpt2", slot=NOTHING, markers=False, format=PromptFormat(answer="{}"))
    with pytest.raises(ValueError, match=r"the prompt format of the answer is '\{\}', without a mark"):
        unmarked.generate(ids, soft_thinking=ONE_WORD)
    lm = build("gpt2", slot=NOTHING, markers=False, format=MARKED)
    with pytest.raises(ValueError, match="prefix_ids and soft_thinking"):
        lm.generate(ids, soft_thinking=ONE_WORD, prefix_ids=ids)
    lm.add_gates(0.9, 0.99)
    with pytest.raises(ValueError, match="this model's gates mix into those"):
        lm.generate(ids, soft_thinking=ONE_WORD)
