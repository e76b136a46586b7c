"""Layers that run again in the backward pass, so that only their inputs are kept until then.

transformers' own gradient checkpointing switches the cache off, and thoughts would lose their context. Here
a layer is a pure function of its arguments and of the keys and values of the passes before; what it adds
to the cache is part of what it gives back, and a second run adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut.acceleration.kv_cache import AppendOnlyCache, AppendOnlyLayer
from coconut.acceleration.patching import patched_forwards


def check_recomputable(model: PreTrainedModel) -> None:
    """Raises ValueError if the model's layers cannot be recomputed."""
    if not _layers(model):
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers marks as recomputable. Keep the activations "
            "(engine.activation_checkpointing=false) and lower micro_batch_size."
        )
    for layer in AppendOnlyCache(model.config).layers:
        if not isinstance(layer, AppendOnlyLayer):
            raise ValueError(
                f"{model.config.model_type} keeps a {type(layer).__name__}, and only keys and values can be kept while "
                "layers are recomputed. Keep the activations (engine.activation_checkpointing=false) and lower "
                "micro_batch_size."
            )


def recomputing(
    model: PreTrainedModel, around: Callable[[], AbstractContextManager[Any]]
) -> AbstractContextManager[None]:
    """Within, a forward pass of the model keeps the inputs of its layers and nothing inside them.

    Their modules' hooks run again with them, and within `around()`, as the first time. A cache must be a GrowingCache.
    """
    return patched_forwards((layer, _recomputed(layer.forward, around)) for layer in _layers(model))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class _EachTime(AbstractContextManager[None]):
    """What `around` gives, anew each time that it is entered: a graph that is kept is gone back through again."""

    def __init__(self, around: Callable[[], AbstractContextManager[Any]]):
        self.around = around
        self.entered = ExitStack()

    def __enter__(self) -> None:
        self.entered.enter_context(self.around())

    def __exit__(self, *raised: Any) -> bool | None:
        return self.entered.__exit__(*raised)


def _recomputed(forward: Callable[..., Any], around: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    how: dict[str, Any] = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _EachTime(around))}

    def call(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return checkpoint(forward, *args, **how, **kwargs)
        if not isinstance(cache, AppendOnlyCache):
            raise ValueError(f"A layer that is recomputed was given a {type(cache).__name__}. Give lm.new_cache().")
        # What the graph holds must not hold what comes after it: such a circle would never be freed.
        before = copy(cache)

        def run(*args: Any, **kwargs: Any) -> tuple[Any, AppendOnlyCache]:
            after = copy(before)

            def given(value: Any) -> Any:
                return after if value is before else value

            return forward(*map(given, args), **{key: given(value) for key, value in kwargs.items()}), after

        def kept(value: Any) -> Any:
            return before if value is cache else value

        arguments = {key: kept(value) for key, value in kwargs.items()}
        output, after = checkpoint(run, *map(kept, args), **how, **arguments)
        cache.layers = after.layers
        return output

    return call
