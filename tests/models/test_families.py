"""Every family of docs/models.md: what holds for GPT-2 holds for it, or it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_table import FAMILIES, LLAMA, PAGE, REFUSED, Family, base_of, new_tokenizer, page
from helpers.models import by_recomputation, gradients, in_float64, mixed_batch, padded, relative, rows_of

from coconut import LatentLM
from coconut.methods import Reasoning
from coconut.models.families import TESTED


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def lm(request: pytest.FixtureRequest) -> LatentLM:
    torch.manual_seed(0)
    lm = LatentLM.from_base(base_of(request.param), new_tokenizer(), init="random", reasoning=Reasoning(num_thoughts=3))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return in_float64(lm.to(torch.float64).eval()) if request.param.float64 else lm.eval()


def done(lm: LatentLM, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    lm.zero_grad()
    loss = lm(**batch).loss_sum
    loss.backward()
    return loss.detach(), gradients(lm)


def same(one: tuple[torch.Tensor, dict[str, Any]], other: tuple[torch.Tensor, dict[str, Any]]) -> None:
    exact = next(iter(one[1].values())).dtype is torch.float64
    torch.testing.assert_close(one[0].double(), other[0].double(), rtol=1e-7 if exact else 1e-5, atol=0)
    assert relative(one[1], other[1]) < (1e-6 if exact else 1e-4)


def test_the_cached_passes_equal_plain_recomputation(lm: LatentLM) -> None:
    batch = mixed_batch(lm)
    same(done(lm, **batch), done(lm, **batch, use_cache=False))


def test_neither_padding_nor_company_changes_a_row(lm: LatentLM) -> None:
    batch = mixed_batch(lm)
    together = done(lm, **batch)
    lm.zero_grad()
    alone = torch.zeros((), dtype=torch.float64)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        loss = lm(ids[mask][None], labels=labels[mask][None]).loss_sum
        loss.backward()
        alone += loss.detach()
    same(together, (alone, gradients(lm)))


def test_without_thoughts_it_is_the_plain_model(lm: LatentLM) -> None:
    ids = torch.randint(3, 35, (2, 12))
    ours = done(lm, input_ids=ids, labels=ids)
    lm.zero_grad()
    logits = lm.base(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    same(ours, (loss.detach(), gradients(lm)))
    torch.testing.assert_close(lm(ids, return_logits=True).logits, logits, rtol=1e-5, atol=1e-6)


def test_a_batch_answers_as_each_question_by_itself(lm: LatentLM) -> None:
    questions = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [15], [16, 17, 18, 19, 20]]
    out = lm.generate(*padded(questions), max_new_tokens=6)
    assert rows_of(out) == [by_recomputation(lm, question, 3, 6) for question in questions]


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_what_cannot_work_is_refused_by_name(family: Family) -> None:
    base = base_of(family)
    before = base.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=family.model_type):
        LatentLM.from_base(base, new_tokenizer())
    assert base.get_input_embeddings().num_embeddings == before, "nothing changed"


def test_saved_and_opened_it_answers_the_same(lm: LatentLM, tmp_path: Path) -> None:
    lm = lm.float()
    ids, mask = padded([[5, 6, 7], [8, 9, 10, 11]])
    before = rows_of(lm.generate(ids, mask, max_new_tokens=4))
    lm.save_pretrained(tmp_path)
    assert rows_of(LatentLM.from_pretrained(tmp_path).eval().generate(ids, mask, max_new_tokens=4)) == before


def test_the_families_that_are_not_tried_on_loading_are_those_tested_here() -> None:
    assert {family.model_type for family in FAMILIES} == TESTED


@pytest.mark.parametrize("model_type", ["olmoe", "stablelm"])
def test_another_family_is_tried_and_taken(model_type: str) -> None:
    lm = LatentLM.from_base(base_of(Family("", model_type, "")), new_tokenizer())
    assert lm.base.config.model_type == model_type


def test_what_turns_positions_anew_is_used_up_to_there() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    sizes = {**LLAMA, "pad_token_id": 0, "rope_parameters": rope, "original_max_position_embeddings": 24}
    assert LatentLM.from_base(base_of(Family("", "phi3", "", sizes)), new_tokenizer()).max_sequence_length == 24


def test_a_head_that_is_not_known_is_noticed() -> None:
    base = base_of(FAMILIES[4])
    inner = base.forward
    base.forward = lambda *args, **kwargs: _scaled(inner(*args, **kwargs))
    with pytest.raises(ValueError, match="llama makes other logits"):
        LatentLM.from_base(base, new_tokenizer())


def _scaled(output: Any) -> Any:
    output.logits = output.logits * 1.1
    return output


def test_the_page_says_what_is_tested() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "PYTHONPATH=tests python -m helpers.family_table writes it"


@pytest.mark.parametrize("lm", FAMILIES[:5], ids=lambda family: family.name, indirect=True)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_by_the_name_that_the_model_has(name: str, lm: LatentLM) -> None:
    batch = mixed_batch(lm)
    expected = done(lm, **batch)
    inner, own = lm.base.base_model.forward, lm.cache_argument
    lm.base.base_model.forward = {
        "cache": lambda cache=None, **given: inner(**given, **{own: cache}),
        "past_key_values": lambda past_key_values=None, **given: inner(**given, **{own: past_key_values}),
    }[name]
    again = LatentLM(lm.base, lm.tokenizer, lm.special, lm.reasoning)
    assert again.cache_argument == name
    same(done(again, **batch), expected)


def test_a_model_without_a_cache_is_not_taken_for_a_recurrent_one() -> None:
    base = base_of(FAMILIES[4])

    def forward(inputs_embeds: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any: ...

    base.base_model.forward = forward
    with pytest.raises(ValueError, match=r"takes no KV cache \(cache or past_key_values\)") as refused:
        LatentLM.from_base(base, new_tokenizer())
    assert "recurrent" not in str(refused.value)
