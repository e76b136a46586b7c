"""Activation checkpointing: run each decoder layer again in the backward pass and save only its input.

transformers' own gradient checkpointing switches the KV cache off, so thoughts would lose their context. Here a layer
is a pure function of its arguments and of the cache before it. The extended cache is part of its output, and the second
run leaves the caller's cache alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut.acceleration.kv_cache import KVCache
from coconut.acceleration.patching import patched_forwards

Context = Callable[[], AbstractContextManager[Any]]


def check_recomputable(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's layers cannot be recomputed."""
    if not _layers(model):
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers marks as recomputable. Keep the activations "
            "(engine.activation_checkpointing=false) and lower micro_batch_size."
        )
    for layer in KVCache(model.config).layers:
        if not isinstance(layer, DynamicLayer):
            raise ValueError(
                f"{model.config.model_type} keeps a {type(layer).__name__}, and only keys and values can be kept while "
                "layers are recomputed. Keep the activations (engine.activation_checkpointing=false) and lower "
                "micro_batch_size."
            )


def recomputed_layers(model: PreTrainedModel, context: Context) -> AbstractContextManager[None]:
    """Make forward passes in this context save only the inputs of layers. A cache must be a KVCache.

    The second run of a layer takes place inside `context()`, and the hooks of its modules run again.
    """
    return patched_forwards((layer, _recomputed(layer.forward, context)) for layer in _layers(model))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class _Reentrant(AbstractContextManager[None]):
    """Enters a new `context()` each time, since a retained graph can be run backward more than once."""

    def __init__(self, context: Context):
        self.context = context
        self.stack = ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(self.context())

    def __exit__(self, *raised: Any) -> bool | None:
        return self.stack.__exit__(*raised)


def _recomputed(forward: Callable[..., Any], context: Context) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Reentrant(context))}

    def call(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return checkpoint(forward, *args, **options, **kwargs)
        if not isinstance(cache, KVCache):
            raise ValueError(f"A layer that is recomputed was given a {type(cache).__name__}. Give lm.new_cache().")
        # The graph must not refer to the caller's cache, which refers to later graphs: the cycle would never be freed.
        before = copy(cache)

        def run(*args: Any, **kwargs: Any) -> tuple[Any, KVCache]:
            after = copy(before)

            def with_copy(value: Any) -> Any:
                return after if value is before else value

            return forward(*map(with_copy, args), **{key: with_copy(value) for key, value in kwargs.items()}), after

        def without_caller(value: Any) -> Any:
            return before if value is cache else value

        arguments = {key: without_caller(value) for key, value in kwargs.items()}
        output, after = checkpoint(run, *map(without_caller, args), **options, **arguments)
        cache.layers = after.layers
        return output

    return call
