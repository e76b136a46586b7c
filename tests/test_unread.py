"""The last layer's feed-forward part works on the columns that are read, and nothing else is different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import build, gradients
from families import FAMILIES
from test_families import base_of
from test_generate import padded
from test_model import mixed_batch

from coconut import LatentLM
from coconut.config import LoraConfig
from coconut.unread import last_feed_forward

INSIDE = {"gpt2": "c_fc", "llama": "gate_proj", "qwen3": "gate_proj"}


@contextmanager
def widths(lm: LatentLM, family: str) -> Iterator[list[int]]:
    """How many columns of each pass went through the last layer's feed-forward part."""
    assert lm._last_feed_forward
    found: list[int] = []
    part = lm.base.get_submodule(f"{lm._last_feed_forward}.{INSIDE[family]}")
    hook = part.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    try:
        yield found
    finally:
        hook.remove()


def answered(lm: LatentLM) -> dict[str, Any]:
    """Three rows of a question, thoughts and an answer, whose prefixes differ in length."""
    L, skip = lm.latent_id, -100
    rows = [[5, 6, 7, 8, L, L, 9, 10], [11, 12, 13, L, L, 14, 15, 16], [17, 18, 19, 20, 21, L, L, 22]]
    labels = [[skip] * 6 + [9, 10], [skip] * 5 + [14, 15, 16], [skip] * 7 + [22]]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}


def of_all(lm: LatentLM, work: Callable[[], Any]) -> Any:
    """The same with every state made whole."""
    part, lm._last_feed_forward = lm._last_feed_forward, None
    try:
        return work()
    finally:
        lm._last_feed_forward = part


@pytest.mark.parametrize("make", [mixed_batch, answered])
@pytest.mark.parametrize("how", ["kept", "recomputed", "LoRA", "not cached"])
def test_losses_and_gradients_are_those_of_all_columns(family: str, how: str, make: Callable[..., Any]) -> None:
    lm = build(family).train()
    if how == "LoRA":
        lm.add_lora(LoraConfig(rank=2), "somewhere")
        lm.double()
    lm.recompute = how == "recomputed"
    batch = {**make(lm), "use_cache": how != "not cached"}

    def done() -> dict[str, torch.Tensor]:
        lm.zero_grad()
        loss = lm(**batch).loss
        loss.backward()
        return gradients(lm) | {"loss": loss.detach()}

    ours, whole = done(), of_all(lm, done)
    assert ours.keys() == whole.keys()
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_of_a_question_one_column_is_read(family: str) -> None:
    lm = build(family).train()
    batch = answered(lm)
    with widths(lm, family) as found:
        loss = lm(**batch).loss
        assert found == [1, 1, 4], "the prefix of 5 columns, a thought, the last thought and up to three words"
        lm.recompute = True
        lm(**batch).loss.backward()
        assert found == [1, 1, 4, 1, 1, 4, 4, 1, 1], "and as many when the layer runs again"
        del found[:]
        lm(**batch, return_logits=True)
        assert sum(found) == 5 + 1 + 4
    assert loss.requires_grad


def test_the_first_column_that_any_row_has_read(family: str) -> None:
    lm = build(family)
    ids = torch.randint(3, 35, (2, 9))
    labels = torch.full_like(ids, -100)
    labels[0, 6:], labels[1, 4:] = ids[0, 6:], ids[1, 4:]
    with widths(lm, family) as found:
        lm(ids, labels=labels)
        lm(ids, labels=torch.full_like(ids, -100))
    assert found == [9 - 3, 1]


def test_an_answer_reads_the_end_of_its_prompt(family: str) -> None:
    lm = build(family, num_thoughts=2)
    ids, mask = padded([[5, 6, 7], [8, 9, 10, 11, 12]])
    with widths(lm, family) as found:
        ours = lm.generate(ids, mask, max_new_tokens=4, min_new_tokens=4)
    assert found[:3] == [1, 1, 1]
    whole = of_all(lm, lambda: lm.generate(ids, mask, max_new_tokens=4, min_new_tokens=4))
    assert torch.equal(ours.tokens, whole.tokens)
    torch.testing.assert_close(ours.thoughts, whole.thoughts)


def test_afterwards_the_layer_is_as_it_was(family: str) -> None:
    lm = build(family)
    part: Any = lm.base.get_submodule(lm._last_feed_forward or "")
    lm(**answered(lm))
    assert "forward" not in vars(part)
    part.forward = own = part.forward
    lm(**answered(lm))
    assert part.forward is own


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_experts_and_what_is_in_the_layer_itself_are_left_alone(family: Any) -> None:
    whole = family.model_type in ("opt", "mixtral", "qwen3_moe")
    assert (last_feed_forward(base_of(family)) is None) == whole
