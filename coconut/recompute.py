"""Layers that run again in the backward pass, so that only their inputs are kept until then.

transformers' own gradient checkpointing switches the cache off, and thoughts would lose their context. Here
a layer is a pure function of its arguments and of the keys and values of the passes before; what it adds
to the cache is part of what it gives back, and a second run adds nothing. Keys and values are kept as each
pass made them and joined only inside a layer: joined ones would be kept once for every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class PassesLayer(DynamicLayer):
    """Keys and values of one layer, (B, heads, tokens, head size) for each pass."""

    passes: tuple[tuple[Tensor, Tensor], ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.passes = (*self.passes, (_alone(key_states), _alone(value_states)))
        keys, values = zip(*self.passes, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.passes)


def _alone(states: Tensor) -> Tensor:
    """A copy where they are a part of a larger tensor (queries, keys and values in one), which they would keep."""
    return states.clone() if states.untyped_storage().nbytes() > states.nbytes else states


class SlidingPassesLayer(PassesLayer, DynamicSlidingWindowLayer):
    """The same where a token sees no more than a window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = keys.shape[-2]
        seen = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -seen:, :], values[..., -seen:, :]


class PassesCache(DynamicCache):
    """A DynamicCache whose copies are cheap and independent: an update replaces a layer, it changes none.

    Raises ValueError if the model has layers that remember in another way than by keys and values.
    """

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.layers = [_in_passes(layer, config) for layer in self.layers]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[layer_idx] = copy(self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __copy__(self) -> PassesCache:
        other = object.__new__(PassesCache)
        other.__dict__ = {**self.__dict__, "layers": list(self.layers)}
        return other


def _in_passes(layer: Any, config: Any) -> PassesLayer:
    if type(layer) is DynamicLayer:
        return PassesLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return SlidingPassesLayer(sliding_window=layer.sliding_window)
    raise ValueError(
        f"{config.model_type} keeps a {type(layer).__name__}, and only keys and values can be kept while layers are "
        "recomputed. Keep the activations (engine.activations=keep) and lower micro_batch_size."
    )


def check_recomputable(model: PreTrainedModel) -> None:
    """Raises ValueError if the model's layers cannot be recomputed."""
    if not _layers(model):
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers marks as recomputable. Keep the activations "
            "(engine.activations=keep) and lower micro_batch_size."
        )
    PassesCache(model.config)


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within, a forward pass of the model keeps the inputs of its layers and nothing inside them.

    Their modules' hooks run again with them. A cache must be a PassesCache.
    """
    layers = _layers(model)
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _recomputed(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if not isinstance(cache, PassesCache):
            raise ValueError(f"A layer that is recomputed was given a {type(cache).__name__}. Give lm.new_cache().")
        # What the graph holds must not hold what comes after it: such a circle would never be freed.
        before = copy(cache)

        def run(*args: Any, **kwargs: Any) -> tuple[Any, PassesCache]:
            after = copy(before)

            def given(value: Any) -> Any:
                return after if value is before else value

            return forward(*map(given, args), **{key: given(value) for key, value in kwargs.items()}), after

        def kept(value: Any) -> Any:
            return before if value is cache else value

        arguments = {key: kept(value) for key, value in kwargs.items()}
        output, after = checkpoint(run, *map(kept, args), use_reentrant=False, **arguments)
        cache.layers = after.layers
        return output

    return call
