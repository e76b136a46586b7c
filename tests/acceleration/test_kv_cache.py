"""AppendOnlyCache returns the keys, values and gradients of a DynamicCache, also when it is cropped or copied."""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.models import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig

from coconut.acceleration.kv_cache import AppendOnlyCache

CONFIGS: dict[str, Any] = {
    "full": LlamaConfig(num_hidden_layers=1),
    "sliding": MistralConfig(num_hidden_layers=1, sliding_window=4),
}


def new(columns: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, columns, 4, dtype=torch.float64, requires_grad=True)


def weighed(cache: Any, keys: Tensor, values: Tensor) -> Tensor:
    """A number that depends on everything attention could read, differently for each column and pass."""
    seen = torch.cat(cache.update(keys, values, 0), dim=-1)
    return (seen.sin() * torch.arange(1, seen.numel() + 1).reshape(seen.shape)).sum()


def gradients(loss: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    columns=st.integers(0, 20),
    counted=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_append_only_cache_equals_a_dynamic_cache(
    kind: str, widths: list[int], columns: int, counted: list[bool]
) -> None:
    """Also if some passes do not contribute to the loss."""
    inputs = [new(width) for width in widths for _ in range(2)]
    found = []
    for cache in (DynamicCache(config=CONFIGS[kind]), AppendOnlyCache(CONFIGS[kind], columns)):
        passes = []
        for start, (keys, values) in enumerate(zip(inputs[::2], inputs[1::2], strict=True)):
            assert cache.get_mask_sizes(keys.shape[-2], 0)[1] >= 0
            passes.append(weighed(cache, keys, values))
            assert cache.get_seq_length() == sum(widths[: start + 1])
        loss = torch.stack(passes)[torch.tensor(counted[: len(passes)])].sum() + 0 * passes[0]
        found.append((loss, gradients(loss, inputs)))
    (before, wanted), (after, got) = found
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("columns", [0, 40])
def test_copies_are_extended_independently(columns: int) -> None:
    inputs = [new(3), new(2), new(1), new(4), new(2)]
    prefix, left, right, more, again = inputs
    found = []
    for cache in (DynamicCache(config=CONFIGS["full"]), AppendOnlyCache(CONFIGS["full"], columns)):
        loss = weighed(cache, prefix, prefix)
        other = copy(cache)
        other.layers = [copy(layer) for layer in cache.layers]
        loss = loss + weighed(cache, left, left)
        loss = loss + 2 * weighed(other, right, right)
        loss = loss + 3 * weighed(cache, more, more)
        loss = loss + 5 * weighed(other, again, again)
        found.append((loss, gradients(loss, inputs)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("columns", [0, 40])
def test_rows_can_be_selected_repeated_and_reordered_and_the_end_cropped(columns: int) -> None:
    inputs = [new(5), new(2), new(1, rows=6), new(1, rows=6)]
    first, second, third, fourth = inputs
    found = []
    for cache in (DynamicCache(config=CONFIGS["full"]), AppendOnlyCache(CONFIGS["full"], columns)):
        loss = weighed(cache, first, first)
        cache.crop(-2)
        loss = loss + weighed(cache, second, second)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        cache.batch_repeat_interleave(2)
        loss = loss + weighed(cache, third, third)
        cache.reorder_cache(torch.LongTensor([5, 4, 3, 2, 1, 0]))
        loss = loss + weighed(cache, fourth, fourth)
        found.append((loss, gradients(loss, inputs)))
    torch.testing.assert_close(found[1], found[0])


def test_backward_can_run_twice_and_for_some_inputs() -> None:
    inputs = [new(3), new(1), new(2)]
    cache = AppendOnlyCache(CONFIGS["full"], 6)
    loss = torch.stack([weighed(cache, part, part) for part in inputs]).sum()
    whole = gradients(loss, inputs, retain_graph=True)
    torch.testing.assert_close(gradients(loss, inputs[1:], retain_graph=True), whole[1:])
    torch.testing.assert_close(gradients(loss, inputs[:1], retain_graph=True), whole[:1])
    torch.testing.assert_close(gradients(loss, inputs), whole)


def test_the_buffer_is_allocated_once_and_holds_everything_once() -> None:
    lm = build("llama", torch.float32)
    ids = torch.randint(3, 35, (2, 12))
    cache = lm.new_cache(12)
    places = set()
    for start, stop in pairwise([0, 6, 7, 8, 12]):
        positions = torch.arange(start, stop).expand(2, -1)
        lm.hidden_states(lm.base.get_input_embeddings()(ids[:, start:stop]), torch.ones(2, stop), positions, cache)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    assert cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes
