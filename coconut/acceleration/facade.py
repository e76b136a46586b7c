"""Acceleration: the one object through which LatentLM and generation use everything in this package.

Its methods are contexts around a piece of work. Each applies the mechanisms that are on and fit the work; with none on,
the work is plain torch and transformers, with the same results up to rounding.

`mechanisms` names those that are on, out of `coconut.config.MECHANISMS`:
- onednn: float32 matrix products on a CPU by oneDNN (linear.py)
- deferred_gradients: weight gradients computed once for all passes (linear.py)
- gelu: GPT-2's GELU in one kernel (gelu.py)
- attention: attention of one query in half precision on a CPU, and compact queries (attention.py)
- final_layer: skip positions whose hidden state is not used, in the last layer (final_layer.py)
- kv_cache: a KV cache that is written once (kv_cache.py)

`activation_checkpointing` and `cuda_graphs` are switches of their own: they trade memory and flexibility for time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.acceleration.activation_checkpointing import check_recomputable, recomputed_layers
from coconut.acceleration.attention import patched_sdpa
from coconut.acceleration.cuda_graphs import CudaGraphs, check_capturable
from coconut.acceleration.final_layer import FinalLayer
from coconut.acceleration.gelu import patched_gelu
from coconut.acceleration.kv_cache import AppendOnlyCache, KVCache
from coconut.acceleration.linear import deferred_weight_gradients, onednn_linear
from coconut.config import MECHANISMS


class Acceleration:
    """The acceleration of one model, with all mechanisms on. `is_tested`: whether its family is among the tested ones.

    Of other families it is not known which modules of the last layer work on each position alone.
    """

    def __init__(self, model: PreTrainedModel, is_tested: bool):
        self.mechanisms: frozenset[str] = frozenset(MECHANISMS)
        self._model = model
        self._final_layer = FinalLayer.of(model) if is_tested else None
        self._activation_checkpointing = False
        self._graphs: CudaGraphs | None = None

    # --- switches -----------------------------------------------------------------------------------

    @property
    def activation_checkpointing(self) -> bool:
        """Whether layers run again in the backward pass instead of keeping their activations.

        Losses and gradients are the same, with dropout (train()) and without (eval()). Setting it raises ValueError if
        the model's layers cannot be recomputed.
        """
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        if value:
            check_recomputable(self._model)
        self._activation_checkpointing = value

    @property
    def cuda_graphs(self) -> bool:
        """Whether the passes of a training batch with thoughts run as CUDA graphs. Without a GPU it has no effect.

        Losses and gradients are the same up to rounding; dropout draws other numbers. Setting it raises ValueError if
        the model's work depends on more than a batch's shape.
        """
        return self._graphs is not None

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        if value:
            check_capturable(self._model)
        self._graphs = CudaGraphs(self._model) if value else None

    # --- what LatentLM and generation call ----------------------------------------------------------

    def new_cache(self, columns: int = 0, windows: bool = True) -> KVCache:
        """An empty KV cache for `columns` columns. `windows`: whether a sliding window limits what a layer returns."""
        if "kv_cache" in self.mechanisms:
            return AppendOnlyCache(self._model.config, columns, windows)
        return KVCache(self._model.config, windows)

    def all_passes(self) -> AbstractContextManager[None]:
        """Around all passes of a batch that takes several."""
        if "deferred_gradients" not in self.mechanisms or not torch.is_grad_enabled() or self._recomputes:
            return nullcontext()
        return deferred_weight_gradients(self._model, onednn="onednn" in self.mechanisms)

    @contextmanager
    def one_pass(self, embeds: Tensor, cached: bool, num_skipped: int) -> Iterator[None]:
        """Around one forward pass over `embeds` (B, T, hidden), with a KV cache or without.

        The first `num_skipped` positions need to produce only keys and values.
        """
        mechanisms = partial(self._in_pass, embeds, cached, num_skipped)
        with recomputed_layers(self._model, mechanisms) if self._recomputes else nullcontext(), mechanisms():
            yield

    def head(self, hidden_states: Tensor) -> AbstractContextManager[None]:
        """Around applying the head to hidden states."""
        return self._onednn(self._model.get_output_embeddings(), hidden_states)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around transformers' generate."""
        table: Any = self._model.get_input_embeddings()
        with self._onednn(self._model, table.weight), self._gelu():
            yield

    def can_replay(self) -> bool:
        """Whether passes over a batch with thoughts can run as CUDA graphs at this moment."""
        training = self._model.training and torch.is_grad_enabled() and not self._activation_checkpointing
        return training and self._graphs is not None and self._model.device.type == "cuda"

    def replay(self, passes: Callable[..., Tensor], inputs: tuple[Tensor, ...], shape: Hashable) -> Tensor:
        """`passes(*inputs)` as a CUDA graph, which is captured for each `shape`. Needs `can_replay`."""
        assert self._graphs is not None
        return self._graphs.run(passes, inputs, shape)

    @property
    def checkpointed_by_transformers(self) -> bool:
        """Whether transformers' own gradient checkpointing is active. It is not `activation_checkpointing`."""
        modules = self._model.modules()
        return self._model.training and any(getattr(module, "gradient_checkpointing", False) for module in modules)

    def refuse_checkpointing_by_transformers(self) -> None:
        """Raise ValueError if it is active: passes that share a cache cannot run with it."""
        if self.checkpointed_by_transformers:
            raise ValueError(
                "Gradient checkpointing switches the cache off inside transformers, and the thoughts would lose "
                "their context without a word. Turn it off (gradient_checkpointing_disable) and set "
                "lm.acceleration.activation_checkpointing = True, or run the recomputing path with use_cache=False."
            )

    # --- inside -------------------------------------------------------------------------------------

    @property
    def _recomputes(self) -> bool:
        return self._activation_checkpointing and torch.is_grad_enabled()

    @contextmanager
    def _in_pass(self, embeds: Tensor, cached: bool, num_skipped: int) -> Iterator[None]:
        """The mechanisms of one pass; none where transformers would run its layers again, outside of this context."""
        if self.checkpointed_by_transformers:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self._gelu())
            stack.enter_context(self._onednn(self._model.base_model, embeds))
            if "attention" in self.mechanisms:
                stack.enter_context(patched_sdpa(embeds, cached))
            if "final_layer" in self.mechanisms and self._final_layer and num_skipped:
                stack.enter_context(self._final_layer.skip_positions(self._model, num_skipped))
            yield

    def _gelu(self) -> AbstractContextManager[None]:
        return patched_gelu(self._model) if "gelu" in self.mechanisms else nullcontext()

    def _onednn(self, module: Any, inputs: Tensor) -> AbstractContextManager[None]:
        return onednn_linear(module, inputs) if "onednn" in self.mechanisms else nullcontext()
