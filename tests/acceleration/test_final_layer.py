"""The last layer computes the positions that are read, and all results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.family_table import FAMILIES, base_of
from helpers.models import assert_same, build, mixed_batch, padded, step

from coconut import LatentLM
from coconut.acceleration import final_layer
from coconut.acceleration.final_layer import FinalLayer
from coconut.config import MECHANISMS, LoraConfig

INSIDE = {"gpt2": "transformer.h.1.mlp.c_fc", "llama": "model.layers.1.mlp.gate_proj",
          "qwen3": "model.layers.1.mlp.gate_proj"}  # fmt: skip


@contextmanager
def widths(lm: LatentLM, family: str) -> Iterator[list[int]]:
    """How many positions of each pass go through the last layer's feed-forward part."""
    found: list[int] = []
    hook = lm.base.get_submodule(INSIDE[family]).register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].shape[1])
    )
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
    """The same with all work of the last layer at every position."""
    lm.acceleration.mechanisms = frozenset(MECHANISMS) - {"final_layer"}
    try:
        return work()
    finally:
        lm.acceleration.mechanisms = frozenset(MECHANISMS)


@pytest.mark.parametrize("make", [mixed_batch, answered])
@pytest.mark.parametrize("how", ["kept", "recomputed", "LoRA", "not cached"])
def test_skipping_positions_changes_neither_losses_nor_gradients(
    family: str, how: str, make: Callable[..., Any]
) -> None:
    lm = build(family).train()
    if how == "LoRA":
        lm.add_lora(LoraConfig(rank=2), "somewhere")
        lm.double()
    lm.acceleration.activation_checkpointing = how == "recomputed"
    batch = {**make(lm), "use_cache": how != "not cached"}
    assert_same(step(lm, batch), of_all(lm, lambda: step(lm, batch)))


def test_one_position_of_a_question_is_computed(family: str) -> None:
    lm = build(family).train()
    batch = answered(lm)
    with widths(lm, family) as found:
        loss = lm(**batch).loss
        assert found == [1, 1, 4], "the prefix of 5 columns, a thought, the last thought and up to three words"
        lm.acceleration.activation_checkpointing = True
        lm(**batch).loss.backward()
        assert found == [1, 1, 4, 1, 1, 4, 4, 1, 1], "and as many when the layer runs again"
        del found[:]
        lm(**batch, return_logits=True)
        assert sum(found) == 5 + 1 + 4
    assert loss.requires_grad


def test_positions_are_computed_from_the_first_that_any_row_reads(family: str) -> None:
    lm = build(family)
    ids = torch.randint(3, 35, (2, 9))
    labels = torch.full_like(ids, -100)
    labels[0, 6:], labels[1, 4:] = ids[0, 6:], ids[1, 4:]
    with widths(lm, family) as found:
        lm(ids, labels=labels)
        lm(ids, labels=torch.full_like(ids, -100))
    assert found == [9 - 3, 1]


def test_generation_computes_the_last_position_of_the_prompt(family: str) -> None:
    lm = build(family, num_thoughts=2)
    ids, mask = padded([[5, 6, 7], [8, 9, 10, 11, 12]])
    with widths(lm, family) as found:
        ours = lm.generate(ids, mask, max_new_tokens=4, min_new_tokens=4)
    assert found[:3] == [1, 1, 1]
    whole = of_all(lm, lambda: lm.generate(ids, mask, max_new_tokens=4, min_new_tokens=4))
    assert torch.equal(ours.tokens, whole.tokens)
    torch.testing.assert_close(ours.thoughts, whole.thoughts)


def test_the_layer_is_restored_afterwards(family: str) -> None:
    lm = build(family)
    assert lm.acceleration._final_layer
    names = (*lm.acceleration._final_layer.positionwise, *lm.acceleration._final_layer.attention)
    parts: list[Any] = [lm.base.get_submodule(name) for name in names]
    assert len(parts) == 3, "attention, its output, and the feed-forward part"
    lm(**answered(lm))
    assert not any("forward" in vars(part) for part in parts)
    for part in parts:
        part.forward = part.forward
    own = [part.forward for part in parts]
    lm(**answered(lm))
    assert [part.forward for part in parts] == own


def test_attention_gets_only_queries_that_are_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(family).train()
    asked: list[tuple[int, int]] = []
    of_later = final_layer._attend_later_queries

    def noted(columns: int, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append((query.shape[-2] - columns, key.shape[-2]))
        return of_later(columns, query, key, *args, **kwargs)

    monkeypatch.setattr(final_layer, "_attend_later_queries", noted)
    lm(**answered(lm))
    assert asked == [(1, 5)], "of five columns before the first thought; what follows is read"
    del asked[:]
    words = torch.randint(3, 35, (2, 9))
    lm(words, labels=torch.where(torch.arange(9) > 5, words, -100))
    assert asked == [(9 - 5, 9)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("columns", [1, 4, 6])
@pytest.mark.parametrize("keys", [7, 9])
def test_later_queries_get_the_same_output(causal: bool, columns: int, keys: int) -> None:
    query, key, value = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (7, keys, keys))
    mask = None if causal else torch.randn(2, 1, 7, keys, dtype=torch.float64)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    found = final_layer._attend_later_queries(columns, query, key, value, mask, is_causal=causal)
    torch.testing.assert_close(found[..., columns:, :], whole[..., columns:, :])
    assert found.shape == whole.shape
    assert not found[..., :columns, :].any()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_experts_and_layers_without_a_feed_forward_module_are_not_skipped(family: Any) -> None:
    whole = family.model_type in ("opt", "mixtral", "qwen3_moe")
    last = FinalLayer.of(base_of(family))
    assert len(last.attention) == 1
    assert len(last.positionwise) == (1 if whole else 2)
