"""Generation: answers do not depend on the batch, and equal those of recomputing without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import ARCHITECTURES, QUESTIONS, build, by_recomputation, byte_level_tokenizer, padded, rows_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from coconut import LatentLM
from coconut.data.tokenization import token_ids
from coconut.generation.generate import answer
from coconut.generation.thoughts import think
from coconut.methods import NOTHING, PAUSES, THOUGHTS, Reasoning, Slot


@pytest.mark.parametrize(("slot", "count"), [(THOUGHTS, 3), (PAUSES, 2), (NOTHING, 0)])
def test_an_answer_that_has_begun_goes_on_after_its_thoughts(family: str, slot: Slot, count: int) -> None:
    lm = build(family, slot=slot, num_thoughts=count, markers=slot is not NOTHING)
    whole = [by_recomputation(lm, question, count, 6) for question in QUESTIONS]
    for width in (1, 3):
        places = [i for i, row in enumerate(whole) if len(row) > width]
        begun = torch.tensor([whole[i][:width] for i in places])
        out = lm.generate(*padded([QUESTIONS[i] for i in places]), max_new_tokens=6 - width, prefix_ids=begun)
        assert rows_of(out) == [whole[i][width:] for i in places]
        assert set(out.num_thoughts.tolist()) == {count if slot == THOUGHTS else 0}


@pytest.mark.parametrize(("slot", "count"), [(THOUGHTS, 3), (THOUGHTS, 0), (PAUSES, 2), (NOTHING, 0)])
@pytest.mark.parametrize("right", [False, True])
def test_a_batch_says_what_each_question_would(family: str, slot: Slot, count: int, right: bool) -> None:
    lm = build(family, slot=slot, num_thoughts=count, markers=slot is not NOTHING)
    ids, mask = padded(QUESTIONS, right)
    out = lm.generate(ids, mask, max_new_tokens=6)
    assert out.num_thoughts.tolist() == [count if slot == THOUGHTS else 0] * len(QUESTIONS)
    expected = [by_recomputation(lm, question, count, 6) for question in QUESTIONS]
    assert rows_of(out) == expected
    alone = [rows_of(lm.generate(torch.tensor([question]), max_new_tokens=6))[0] for question in QUESTIONS]
    assert alone == expected


def test_the_number_of_thoughts_can_be_set_and_matters() -> None:
    lm = build("llama", num_thoughts=2)
    answers = set()
    for count in (0, 1, 2, 3, 5):
        out = lm.generate(*padded(QUESTIONS), max_new_tokens=6, num_thoughts=count)
        assert out.num_thoughts.tolist() == [count] * len(QUESTIONS)
        assert rows_of(out) == [by_recomputation(lm, question, count, 6) for question in QUESTIONS]
        answers.add(str(rows_of(out)))
    assert len(answers) >= 4, "else the other tests would hold for a model that ignores its thoughts"


def test_its_own_thoughts_fed_back_change_nothing_and_others_do(family: str) -> None:
    lm = build(family, num_thoughts=3)
    ids, mask = padded(QUESTIONS)
    usual = lm.generate(ids, mask, max_new_tokens=6)
    assert usual.thoughts.shape == (len(QUESTIONS), 3, lm.base.config.hidden_size)
    again = lm.generate(ids, mask, max_new_tokens=6, thoughts=usual.thoughts)
    assert rows_of(again) == rows_of(usual)
    torch.testing.assert_close(again.thoughts, usual.thoughts, rtol=0, atol=0)
    other = lm.generate(ids, mask, max_new_tokens=6, thoughts=usual.thoughts.flip(0) * 3)
    assert rows_of(other) != rows_of(usual)


def test_thoughts_are_the_states_that_training_feeds_back(family: str) -> None:
    lm = build(family, num_thoughts=3)
    ids, mask = padded(QUESTIONS)
    prompts = torch.cat([ids, torch.full_like(ids[:, :1], lm.special.bot)], dim=1)
    is_token = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    thinking = think(lm, prompts, is_token, 3)
    whole = torch.cat([prompts, torch.full_like(ids[:, :3], lm.latent_id)], dim=1)
    logits = lm(whole, torch.cat([is_token, torch.ones_like(mask[:, :3])], dim=1), return_logits=True).logits
    states = torch.cat([thinking.thoughts, thinking.states[:, None]], dim=1)
    torch.testing.assert_close(lm.logits(states), logits[:, -4:])
    assert thinking.counts.tolist() == [3] * len(QUESTIONS)


def test_each_row_stops_thinking_by_itself(family: str) -> None:
    lm = build(family, num_thoughts=4)
    ids, mask = padded(QUESTIONS)
    usual = lm.generate(ids, mask, max_new_tokens=6).thoughts
    ends = [1, 3, 4, 2]
    last = torch.stack([usual[row, ends[row % 4] - 1] for row in range(len(QUESTIONS))])

    def stop(thoughts_BD: torch.Tensor) -> torch.Tensor:
        return (thoughts_BD[:, None].float() - last).abs().amax(-1).lt(1e-9).any(1)

    out = lm.generate(ids, mask, max_new_tokens=6, stop=stop)
    counts = [ends[row % 4] for row in range(len(QUESTIONS))]
    assert out.num_thoughts.tolist() == counts
    for row, (question, count) in enumerate(zip(QUESTIONS, counts, strict=True)):
        assert rows_of(out)[row] == by_recomputation(lm, question, count, 6)
        assert (out.thoughts[row, count:] == 0).all()


def of_bytes(model_type: str, num_thoughts: int, **sizes: Any) -> LatentLM:
    """A model with a byte-level tokenizer."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes))
    return LatentLM.from_base(base, tokenizer, "random", Reasoning(num_thoughts=num_thoughts)).eval()


def test_rows_stop_by_themselves_behind_a_sliding_window_too() -> None:
    lm = of_bytes("mistral", num_thoughts=3, **ARCHITECTURES["llama"], sliding_window=4)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    first = lm.generate(ids, max_new_tokens=5).thoughts[1, 0]
    out = lm.generate(ids, max_new_tokens=5, stop=lambda thoughts: (thoughts.cpu() == first).all(1))
    assert out.num_thoughts.tolist() == [3, 1]
    for row, count in enumerate((3, 1)):
        alone = lm.generate(ids[row : row + 1], max_new_tokens=5, num_thoughts=count)
        assert rows_of(alone)[0] == rows_of(out)[row]


def test_thoughts_that_do_not_fit_are_refused() -> None:
    lm = build("gpt2", num_thoughts=2)
    for thoughts, count in ((torch.zeros(3, 2, 32), None), (torch.zeros(4, 2, 32), 1)):
        with pytest.raises(ValueError, match="for 4 questions"):
            lm.generate(*padded(QUESTIONS), thoughts=thoughts, num_thoughts=count)
    with pytest.raises(ValueError, match="no latent thoughts"):
        build("gpt2", slot=PAUSES, num_thoughts=2).generate(torch.tensor([[5, 6]]), thoughts=torch.zeros(1, 2, 32))


def prefer(lm: LatentLM, token: int) -> None:
    """Give one token by far the largest logit at every position."""
    head: Any = lm.base.get_output_embeddings()
    hidden = lm.base.config.hidden_size
    bias = torch.nn.Linear(hidden, head.weight.shape[0]).to(head.weight)
    with torch.no_grad():
        bias.weight.copy_(head.weight)
        bias.bias.zero_()
        bias.bias[token] = 1000.0
    lm.base.set_output_embeddings(bias)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0}])
def test_added_tokens_are_never_produced(sampling: dict[str, Any]) -> None:
    lm = build("llama", num_thoughts=1)
    prefer(lm, lm.latent_id)
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=8, **sampling)
    assert not set(out.tokens.flatten().tolist()) & set(lm.special.added)


def test_answers_that_end_and_answers_that_are_cut() -> None:
    lm = build("llama", num_thoughts=1)
    ids, mask = padded(QUESTIONS)
    assert lm.generate(ids, mask, max_new_tokens=1).truncated.any()
    prefer(lm, lm.special.eos)
    out = lm.generate(ids, mask, max_new_tokens=8)
    assert not out.truncated.any()
    assert out.lengths.tolist() == [0, 0, 0, 0]
    assert out.texts == [""] * 4


def test_sampling_is_seeded() -> None:
    lm = build("llama", num_thoughts=2)

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return rows_of(lm.generate(*padded(QUESTIONS), max_new_tokens=8, do_sample=True, temperature=1.0))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generating_leaves_the_model_as_it_was() -> None:
    lm = build("llama", num_thoughts=2)
    lm.train()
    first: Any = lm.base.base_model.get_submodule("layers.0")
    first.eval()
    lm.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert lm.training
    assert not first.training, "each part is as it was"
    assert all(p.grad is None for p in lm.parameters())


def test_questions_as_text() -> None:
    lm = build("gpt2", num_thoughts=2)
    out = answer(lm, ["1 2 3", "4 5 <latent> 6 7"], max_new_tokens=4)
    assert len(out.texts) == 2
    assert out.texts[0] == answer(lm, ["1 2 3"], max_new_tokens=4).texts[0]


def test_a_question_that_fills_the_context_is_refused() -> None:
    lm = build("gpt2", num_thoughts=2)
    with pytest.raises(ValueError, match=r"Question 1 has 95 tokens; with 4 more .* no room .* of 96 tokens"):
        lm.generate(torch.full((1, 95), 5))


def test_little_room_for_one_answer_is_enough_for_the_others() -> None:
    lm = build("gpt2", num_thoughts=2)
    rows = [[5, 6, 7], [8] * 88, [9] * 80]
    ids, mask = padded(rows)
    out = lm.generate(ids, mask, max_new_tokens=10)
    alone = [rows_of(lm.generate(torch.tensor([row]), max_new_tokens=10))[0] for row in rows]
    assert rows_of(out) == alone
    assert len(alone[1]) <= 4 < len(alone[0])


def test_settings_of_the_base_model_change_nothing() -> None:
    lm = build("llama", num_thoughts=2)
    ids, mask = padded(QUESTIONS)
    before = rows_of(lm.generate(ids, mask, max_new_tokens=8))
    settings: Any = lm.base.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 5.0, 1
    assert rows_of(lm.generate(ids, mask, max_new_tokens=8)) == before
    assert settings.repetition_penalty == 5.0


def test_a_text_that_stops_an_answer() -> None:
    lm = of_bytes("llama", num_thoughts=2, bos_token_id=0, eos_token_id=1, **ARCHITECTURES["llama"])
    prefer(lm, token_ids(lm.tokenizer, ["a"])[0])
    ids, mask = padded(QUESTIONS)
    out = lm.generate(ids, mask, max_new_tokens=8, stop_strings=["aaa"])
    assert out.texts == ["aaa"] * 4
    assert out.lengths.tolist() == [3] * 4
    assert not out.truncated.any()
    assert not lm.generate(ids, mask, max_new_tokens=3, stop_strings="aaa").truncated.any(), "ended right at the limit"
    assert lm.generate(ids, mask, max_new_tokens=8).truncated.all()


@pytest.mark.parametrize(("slot", "count"), [(THOUGHTS, 2), (NOTHING, 0)])
def test_stop_texts_with_a_vocabulary_of_words(slot: Slot, count: int) -> None:
    """An answer ends where the text is complete; text of the question does not count."""
    lm = build("gpt2", slot=slot, num_thoughts=count, markers=slot is not NOTHING)
    ids, mask = padded(QUESTIONS)
    whole = lm.generate(ids, mask, max_new_tokens=8)
    stop = " ".join(whole.texts[0].split()[1:3])
    out = lm.generate(ids, mask, max_new_tokens=8, stop_strings=stop)
    assert out.lengths[0] == 3
    for before, text in zip(whole.texts, out.texts, strict=True):
        assert text == (before[: before.index(stop) + len(stop)] if stop in before else before)
    asked = lm.tokenizer.decode(QUESTIONS[0][-1:])
    prefer(lm, QUESTIONS[0][-1])
    pair = f"{asked} {asked}"
    assert lm.generate(torch.tensor([QUESTIONS[0]]), max_new_tokens=8, stop_strings=[pair]).texts == [pair]


@pytest.mark.parametrize(("slot", "count"), [(THOUGHTS, 3), (PAUSES, 2), (NOTHING, 0)])
def test_several_answers_from_one_reading(family: str, slot: Slot, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal answers to the repeated question, with one prefill."""
    lm = build(family, slot=slot, num_thoughts=count, markers=slot is not NOTHING)
    ids, mask = padded(QUESTIONS)
    how = {"max_new_tokens": 6, "do_sample": True}
    torch.manual_seed(0)
    asked_often = lm.generate(ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0), **how)
    read: list[int] = []
    states = LatentLM.hidden_states

    def hidden_states(lm: LatentLM, embeds: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        read.append(len(embeds))
        return states(lm, embeds, *rest, **options)

    monkeypatch.setattr(LatentLM, "hidden_states", hidden_states)
    torch.manual_seed(0)
    out = lm.generate(ids, mask, num_return_sequences=3, **how)
    assert read == [len(QUESTIONS)] * (1 + (count if slot == THOUGHTS else 0))
    assert rows_of(out) == rows_of(asked_often)
    assert len({tuple(row) for row in rows_of(out)[:3]}) > 1, "they are sampled one by one"
    assert out.texts == asked_often.texts
    assert torch.equal(out.truncated, asked_often.truncated)
    torch.testing.assert_close(out.thoughts, asked_often.thoughts)


def test_what_generation_does_not_do_is_refused() -> None:
    lm = build("llama", num_thoughts=2)
    ids = torch.tensor([[5, 6]])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"use_cache": False}, "use_cache=False is not supported"),
        ({"generation_config": GenerationConfig(guidance_scale=2.0)}, "guidance_scale=2.0 is not supported"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2 is not supported"),
        ({"temperture": 0.5}, "Did you mean temperature"),
        ({"num_thought": 3}, "Did you mean num_thoughts"),
        ({"eos_token_id": 3}, "eos_token_id=3 is not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 without do_sample=True"),
        ({"thoughts": torch.zeros(2, 32)}, r"thoughts has the shape \(2, 32\)"),
        ({"thoughts": torch.zeros(1, 3, 8)}, r"thoughts has the shape \(1, 3, 8\), .* states of 32 numbers"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            lm.generate(ids, **options)
    for questions in ([], "1 2 3"):
        with pytest.raises(ValueError, match="must be a list of texts"):
            answer(lm, questions)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="There is no question"):
        lm.generate(ids[:0])
    with pytest.raises(ValueError, match="Question 2 is empty"):
        lm.generate(ids.repeat(2, 1), torch.tensor([[1, 1], [0, 0]]))
    plain = build("llama", slot=NOTHING, markers=False, method="cot")
    with pytest.raises(ValueError, match="cot has neither thoughts nor pauses"):
        plain.generate(torch.tensor([[5, 6]]), num_thoughts=2)


def test_each_question_with_its_own_number_of_thoughts(family: str) -> None:
    lm = build(family, num_thoughts=3)
    counts = [2, 0, 5, 2]
    ids, mask = padded(QUESTIONS)
    out = lm.generate(ids, mask, num_thoughts=counts, max_new_tokens=6)
    assert out.num_thoughts.tolist() == counts
    assert rows_of(out) == [by_recomputation(lm, q, n, 6) for q, n in zip(QUESTIONS, counts, strict=True)]
    for wrong in ([1, 2], [1, 2, 3, -1], 1.5):
        with pytest.raises(ValueError, match="one for each of 4 questions"):
            lm.generate(ids, mask, num_thoughts=wrong)


def test_what_transformers_takes_is_taken() -> None:
    lm = build("llama", torch.float32, num_thoughts=2)
    ids, mask = padded(QUESTIONS)
    asked = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=5, num_return_sequences=2)
    torch.manual_seed(0)
    one_by_one = lm.generate(ids, mask, 5, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=2)
    torch.manual_seed(0)
    at_once = lm.generate(ids, mask, generation_config=asked)
    assert rows_of(at_once) == rows_of(one_by_one)
    seen: list[int] = []

    class Ends(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(input_ids.shape[1])
            return torch.full((len(input_ids),), len(seen) == 2)

    harmless = GenerationConfig(num_beams=1, use_cache=False, pad_token_id=7, max_length=3, max_new_tokens=5)
    assert rows_of(lm.generate(ids, mask, generation_config=harmless)) == rows_of(lm.generate(ids, mask, 5))
    first = rows_of(lm.generate(ids[:1], mask[:1], 5, streamer=None))[0]
    without = rows_of(lm.generate(ids[:1], mask[:1], 5, suppress_tokens=[first[0]]))[0]
    assert first[0] not in without
    assert not set(without) & set(lm.special.added)
    out = lm.generate(ids, mask, 5, stopping_criteria=StoppingCriteriaList([Ends()]))
    assert out.tokens.shape[1] == 2
    assert not out.truncated.any()


def test_an_answer_is_streamed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    lm = build("llama", torch.float32, num_thoughts=2)
    ids = torch.tensor([QUESTIONS[1]])
    streamer = TextStreamer(lm.tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)
    out = lm.generate(ids, max_new_tokens=5, streamer=streamer)
    assert capsys.readouterr().out.split() == out.texts[0].split()
    with pytest.raises(ValueError, match="not 1 to 4"):
        lm.generate(*padded(QUESTIONS), streamer=streamer)
