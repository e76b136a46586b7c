"""The keys and values of the passes so far, written once, and their gradients, summed in place.

A DynamicCache joins what it holds with what is new for every pass: each thought then copies the keys and values
of the whole prompt, keeps the copy for the backward pass, and adds up one more gradient of that size. Here a pass
writes its own columns behind those of the passes before and is given a view of all.

Shapes: (B, heads, columns, head size).
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coconut.utils.torch_utils import differentiable_once


class KVBuffer:
    """Keys or values of one layer: columns that are filled from the left, and their gradient in a backward pass."""

    def __init__(self, like: Tensor, columns: int):
        self.columns = like.new_empty(*like.shape[:-2], columns, like.shape[-1])
        self.filled = 0
        self._gradient: Tensor | None = None
        self._backward = -1

    def goes_on_from(self, before: Tensor, stop: int) -> bool:
        """Whether `before` is all that was written here, and there is room up to `stop`."""
        here = before.data_ptr() == self.columns.data_ptr() and len(before) == len(self.columns)
        return here and before.shape[-2] == self.filled and stop <= self.columns.shape[-2]

    def write(self, start: int, new: Tensor) -> Tensor:
        self.filled = start + new.shape[-2]
        self.columns[..., start : self.filled, :] = new
        return self.columns.data[..., : self.filled, :]  # of .data, since what comes later is written beside it

    def collect(self, gradient: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Add the gradient of the first `stop` columns; that of the last of them is then complete."""
        backward = torch._C._current_graph_task_id()
        if self._backward != backward:
            self._backward, self._gradient = backward, None
        if self._gradient is None:
            self._gradient = None if gradient is None else gradient.clone()
        elif gradient is not None:
            self._gradient[..., :stop, :] += gradient
        found = None if self._gradient is None else self._gradient[..., start:stop, :]
        if not start:
            self._gradient = None
        return found


class _Append(torch.autograd.Function):
    """Behind `before` (None if there is nothing), which a room holds, `new`: a view of both.

    `before` has no gradient of its own: it stands here so that the backward passes of all that is written later
    come first.
    """

    @staticmethod
    def forward(ctx: Any, room: KVBuffer, before: Tensor | None, new: Tensor) -> Tensor:
        start = 0 if before is None else before.shape[-2]
        ctx.room, ctx.start, ctx.stop = room, start, start + new.shape[-2]
        ctx.set_materialize_grads(False)
        return room.write(start, new)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, ctx.room.collect(gradient, ctx.start, ctx.stop)


def append(room: KVBuffer, before: Tensor | None, new: Tensor) -> Tensor:
    found = _Append.apply(room, before, new)
    assert isinstance(found, Tensor)
    return found


class AppendOnlyLayer(DynamicLayer):
    """The keys and values of one layer, with room for so many columns, and more when they are needed."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        self.rooms: tuple[KVBuffer, KVBuffer] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        held = (self.keys, self.values) if self.get_seq_length() else (None, None)
        stop = self.get_seq_length() + key_states.shape[-2]
        if not self.rooms or held[0] is None or not self.rooms[0].goes_on_from(held[0], stop):
            columns = self.columns if stop <= self.columns else stop + stop // 4
            self.rooms = KVBuffer(new[0], columns), KVBuffer(new[1], columns)
            held = tuple(
                None if part is None else append(room, None, part) for room, part in zip(self.rooms, held, strict=True)
            )
        self.keys, self.values = (append(*parts) for parts in zip(self.rooms, held, new, strict=True))
        return self.keys, self.values


class AppendOnlySlidingLayer(AppendOnlyLayer, DynamicSlidingWindowLayer):
    """The same where a token sees no more than a window."""

    def __init__(self, columns: int, sliding_window: int):
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.columns, self.rooms = columns, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = keys.shape[-2]
        seen = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -seen:, :], values[..., -seen:, :]


class AppendOnlyCache(DynamicCache):
    """A DynamicCache for a model of this config whose layers have room for `columns` from the start.

    Without `windows` every layer is given all that there is: masks say what it may see.

    Copies are cheap and independent: an update replaces a layer, it changes none, and what a copy writes does not
    reach the other. Layers that remember in another way than by keys and values are as in a DynamicCache.
    """

    def __init__(self, config: Any, columns: int = 0, windows: bool = True):
        super().__init__(config=config)
        self.layers = [_growing(layer, columns, windows) for layer in self.layers]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.layers[layer_idx], AppendOnlyLayer):
            self.layers[layer_idx] = copy(self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __copy__(self) -> AppendOnlyCache:
        other = object.__new__(AppendOnlyCache)
        other.__dict__ = {**self.__dict__, "layers": [copy(layer) for layer in self.layers]}
        return other


def _growing(layer: Any, columns: int, windows: bool) -> Any:
    if type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and not windows):
        return AppendOnlyLayer(columns)
    if type(layer) is DynamicSlidingWindowLayer:
        return AppendOnlySlidingLayer(columns, layer.sliding_window)
    return layer
