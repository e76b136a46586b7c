"""KV caches. AppendOnlyCache writes keys and values once and sums their gradients in place.

transformers' DynamicCache concatenates old and new keys and values in every pass. Each thought then copies those of the
whole prompt, saves the copy for the backward pass, and adds one more gradient of that size. Here a pass writes its
columns behind those of earlier passes, into a buffer, and gets a view of all of them.

Shapes: (B, heads, columns, head size).
"""

from __future__ import annotations

from copy import copy
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coconut.utils.torch_utils import apply, differentiable_once


class KVCache(DynamicCache):
    """A DynamicCache with cheap, independent copies: an update replaces a layer and leaves the old one as it is.

    With `windows=False` a layer with a sliding window returns all columns; attention masks have to apply the window.
    """

    def __init__(self, config: Any, windows: bool = True):
        super().__init__(config=config)
        if not windows:
            self.layers = [
                DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in self.layers
            ]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.layers[layer_idx], DynamicLayer):
            self.layers[layer_idx] = copy(self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "layers": [copy(layer) for layer in self.layers]}
        return other


class AppendOnlyCache(KVCache):
    """A KVCache whose layers append to buffers, allocated for `columns` columns and enlarged when they are full.

    Layers that keep anything but keys and values are those of a DynamicCache.
    """

    def __init__(self, config: Any, columns: int = 0, windows: bool = True):
        super().__init__(config, windows)
        self.layers = [_append_only(layer, columns) for layer in self.layers]


def _append_only(layer: Any, columns: int) -> Any:
    if type(layer) is DynamicLayer:
        return AppendOnlyLayer(columns)
    return AppendOnlySlidingLayer(columns, layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


class AppendOnlyLayer(DynamicLayer):
    """Keys and values of one layer. `columns`: the initial capacity of the buffers."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        self.buffers: tuple[KVBuffer, KVBuffer] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        old = (self.keys, self.values) if self.get_seq_length() else (None, None)
        stop = self.get_seq_length() + key_states.shape[-2]
        if not self.buffers or old[0] is None or not self.buffers[0].can_append(old[0], stop):
            columns = self.columns if stop <= self.columns else stop + stop // 4
            self.buffers = KVBuffer(new[0], columns), KVBuffer(new[1], columns)
            if old[0] is not None:
                old = tuple(apply(_Append, buffer, None, part) for buffer, part in zip(self.buffers, old, strict=True))
        self.keys, self.values = (apply(_Append, *parts) for parts in zip(self.buffers, old, new, strict=True))
        return self.keys, self.values


class AppendOnlySlidingLayer(AppendOnlyLayer, DynamicSlidingWindowLayer):
    """Keeps all columns and returns those in the sliding window."""

    def __init__(self, columns: int, sliding_window: int):
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.columns, self.buffers = columns, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = keys.shape[-2]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]


class KVBuffer:
    """Keys or values of one layer, filled from the left, and their gradient during a backward pass."""

    def __init__(self, like: Tensor, columns: int):
        self.data = like.new_empty(*like.shape[:-2], columns, like.shape[-1])
        self.filled = 0
        self._gradient: Tensor | None = None
        self._backward_id = -1

    def can_append(self, old: Tensor, stop: int) -> bool:
        """Whether `old` is everything that was written to this buffer, and there is room up to column `stop`."""
        is_here = old.data_ptr() == self.data.data_ptr() and len(old) == len(self.data)
        return is_here and old.shape[-2] == self.filled and stop <= self.data.shape[-2]

    def write(self, start: int, new: Tensor) -> Tensor:
        self.filled = start + new.shape[-2]
        self.data[..., start : self.filled, :] = new
        return self.data.data[..., : self.filled, :]  # .data: later writes beside it must not count as changes to it

    def collect(self, gradient: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Add a gradient of the first `stop` columns; return that of the columns from `start` on, which is complete."""
        backward_id = torch._C._current_graph_task_id()
        if self._backward_id != backward_id:
            self._backward_id, self._gradient = backward_id, None
        if self._gradient is None:
            self._gradient = None if gradient is None else gradient.clone()
        elif gradient is not None:
            self._gradient[..., :stop, :] += gradient
        complete = None if self._gradient is None else self._gradient[..., start:stop, :]
        if not start:
            self._gradient = None
        return complete


class _Append(torch.autograd.Function):
    """Write `new` behind `old`, the view of the buffer's content, if any. Return a view of both.

    `old` gets no gradient from here. As an input it orders the backward passes: later writes come first.
    """

    @staticmethod
    def forward(ctx: Any, buffer: KVBuffer, old: Tensor | None, new: Tensor) -> Tensor:
        start = 0 if old is None else old.shape[-2]
        ctx.buffer, ctx.start, ctx.stop = buffer, start, start + new.shape[-2]
        ctx.set_materialize_grads(False)
        return buffer.write(start, new)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, ctx.buffer.collect(gradient, ctx.start, ctx.stop)
