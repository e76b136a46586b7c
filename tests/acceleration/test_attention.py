"""Attention of one query in half precision: equal to torch's, and used only where it applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import assert_same, build, in_graph, mixed_batch, step, token_batch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ablations import saved_megabytes
from coconut.acceleration.attention import _OneQuery, patched_sdpa
from coconut.config import MECHANISMS
from coconut.models.masks import attend_to_self_mask

MASKS = {
    "none": None,
    "boolean": torch.ones(3, 1, 1, 7, dtype=torch.bool).index_fill(3, torch.tensor([0, 1]), False),
    "additive": torch.linspace(-2, 2, 7, dtype=torch.bfloat16).expand(3, 1, 1, 7),
}


def parts(queries: int = 1, dtype: torch.dtype = torch.bfloat16, heads: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 2, queries, 5), (3, heads, 7, 5), (3, heads, 7, 5)]
    return [torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def within(parts: list[Tensor], mask: Tensor | None = None, **options: Any) -> Tensor:
    query, key, value = parts
    with patched_sdpa(query.transpose(1, 2).flatten(2), cached=False):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def is_ours(made: Tensor) -> bool:
    return in_graph(made, _OneQuery) == 1


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_of_one_query_equals_torchs(mask: Tensor | None, scale: float | None) -> None:
    half = parts()
    whole = [part.detach().float().requires_grad_() for part in half]
    made = within(half, mask, scale=scale)
    assert is_ours(made)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    query, key, value = whole
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (made * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    for ours, theirs in [(made, expected), *((a.grad, b.grad) for a, b in zip(half, whole, strict=True))]:
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == torch.bfloat16
        assert float((ours.detach().float() - theirs.detach()).norm()) < 0.02 * float(theirs.detach().norm())


def test_a_fully_masked_row_gives_no_nan() -> None:
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1] = False
    half = parts()
    made = within(half, mask)
    made[[0, 2]].sum().backward()
    assert made.isfinite().all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in half)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (parts(dtype=torch.float32), {}), (parts(queries=7), {}), (parts(), {"dropout_p": 0.5}),
        (parts(), {"is_causal": True}), (parts(heads=1), {"enable_gqa": True}),
        ([part.detach() for part in parts()], {}),
    ],
    ids=["float32", "several queries", "dropout", "causal", "grouped", "no gradient"],
)  # fmt: skip
def test_other_calls_use_torchs_attention(inputs: list[Tensor], options: dict[str, Any]) -> None:
    query, key, value = inputs
    made = within(inputs, **options)
    assert not is_ours(made)
    if "dropout_p" not in options:
        assert torch.equal(made, scaled_dot_product_attention(query, key, value, **options))


def test_thoughts_use_attention_of_one_query() -> None:
    lm = build("gpt2", torch.bfloat16)
    ids = torch.randint(3, 20, (2, 9))
    ids[:, 4:7] = lm.latent_id
    loss = lm(ids, labels=ids).loss
    assert loss is not None
    layers = lm.base.config.num_hidden_layers
    assert in_graph(loss, _OneQuery) == 2 * layers, "of three the last has company"


def test_keys_and_values_are_saved_once() -> None:
    """GPT-2 computes them in one product with the queries. A single pass saves as much as without the copy."""
    lm = build("gpt2", torch.float32)
    found = {}
    for thoughts in (0, 2):
        row = torch.randint(3, 35, (3, 24))
        row[:, 16 : 16 + thoughts] = lm.latent_id
        batch = token_batch(row, torch.ones_like(row), row)
        lm.acceleration.mechanisms = frozenset(MECHANISMS) - {"attention"}
        without = saved_megabytes(lm, batch)
        lm.acceleration.mechanisms = frozenset(MECHANISMS)
        found[thoughts] = without - saved_megabytes(lm, batch)
    columns, layers, width = 16 + 24 - 17, 2, lm.base.config.hidden_size  # all but the thought between two passes
    assert found == pytest.approx({0: 0, 2: 3 * columns * layers * 2 * width * 4 / 1e6})


def test_padding_attends_to_itself_and_tokens_to_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
    whole = attend_to_self_mask(mask, torch.zeros(2, 4, 8))[:, 0].int().tolist()
    assert whole[0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert whole[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert attend_to_self_mask(mask, torch.zeros(2, 1, 8)).int().tolist() == [[[[0, 0, 1, 1]]], [[[1, 0, 1, 1]]]]


def test_padding_that_attends_to_itself_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(family)
    before = step(lm, mixed_batch(lm))
    monkeypatch.setattr("coconut.models.masks.has_fully_masked_query", lambda *_: True)
    assert_same(step(lm, mixed_batch(lm)), before)
