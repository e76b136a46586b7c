"""Capture the passes of a training batch as CUDA graphs, once per shape, and replay them with one launch each way.

On a GPU a thought's pass is bound by kernel launches: hundreds of kernels of a few microseconds each. A graph holds
addresses. Inputs and outputs are therefore copied, weights must stay where they are, and since all graphs share their
memory, the backward pass of one must run before the next is replayed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from coconut.utils.torch_utils import apply, differentiable_once

Passes = Callable[..., Tensor]
MAX_GRAPHS = 128  # each keeps its inputs, its hidden states and their gradients, besides the shared memory
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of this number in configs


def check_capturable(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's work depends on more than a batch's shape."""
    config: Any = model.config.get_text_config(decoder=True)
    windows = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
    if windows or any(getattr(config, name, None) for name in EXPERT_COUNTS):
        raise ValueError(
            f"{config.model_type}: {'sliding windows depend' if windows else 'the choice of experts depends'} on more "
            "than a batch's shape, so its passes cannot be CUDA graphs. Leave engine.cuda_graphs=false."
        )


class CudaGraphs:
    """The graphs of one model. A shape is captured when it comes for the second time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self._gradients: _WeightGradients | None = None
        self._pending: Callable[[], _ReplayToken | None] = lambda: None

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs(deepcopy(self._model, memo))

    def run(self, passes: Passes, inputs: Sequence[Tensor], shape: Hashable) -> Tensor:
        """`passes(*inputs)`. The first input and the weights may require gradients.

        `shape`: whatever the work depends on besides the shapes of the inputs.
        """
        if self._pending() is not None:  # the backward pass of the last replay is still to come
            return passes(*inputs)
        weights = self._trained_weights()
        places = tuple(weight.data_ptr() for weight in weights)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (shape, tuple((t.shape, t.dtype, t.requires_grad) for t in inputs), places, autocast)
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.add(key)
                return passes(*inputs)
            graph = self._capture(passes, inputs, weights, autocast)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for static, tensor in zip(graph.inputs, inputs, strict=True):
            static.data.copy_(tensor)
        token = _ReplayToken()
        self._pending = weakref.ref(token)
        return apply(_Replay, graph, token, inputs[0], *weights)

    def _trained_weights(self) -> list[Tensor]:
        """All trained weights but those of the embedding table and the head, which are outside of the graphs."""
        tables: list[Any] = [self._model.get_input_embeddings(), self._model.get_output_embeddings()]
        outside = {weight for table in tables for weight in table.parameters()}
        return [weight for weight in self._model.parameters() if weight.requires_grad and weight not in outside]

    def _capture(
        self, passes: Passes, inputs: Sequence[Tensor], weights: Sequence[Tensor], autocast: torch.dtype | None
    ) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._gradients is None or self._gradients.shapes != [weight.shape for weight in weights]:
            self._graphs.clear()
            self._gradients = _WeightGradients(weights)
        uncached = torch.autocast("cuda", autocast, cache_enabled=False) if autocast else nullcontext()
        device = inputs[0].device
        with torch.random.fork_rng([device]), uncached, detached_leaf_parameters(self._model, weights) as leaves:
            return _Graph(passes, inputs, leaves, self._gradients, self._pool)


@contextmanager
def detached_leaf_parameters(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Replace these weights of the model by other leaf tensors in the same memory.

    Autograd ties a leaf to the stream of its first use for as long as a graph with it lives, and a captured graph must
    not depend on another stream.
    """
    leaves = [weight.detach().requires_grad_() for weight in weights]
    by_id = {id(weight): leaf for weight, leaf in zip(weights, leaves, strict=True)}
    before = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    for parameters, originals in before:
        parameters.update({name: by_id.get(id(weight), weight) for name, weight in originals.items()})  # pyright: ignore
    try:
        yield leaves
    finally:
        for parameters, originals in before:
            parameters.update(originals)


class _ReplayToken:
    """Lives until the backward pass of a replay has run or can no longer run."""


class _WeightGradients:
    """The gradients of all weights in one tensor, which all graphs share."""

    def __init__(self, weights: Sequence[Tensor]):
        self.shapes = [weight.shape for weight in weights]
        self.flat = weights[0].new_zeros(sum(shape.numel() for shape in self.shapes))
        self.parts = self._split(self.flat)

    def store(self, gradients: Sequence[Tensor | None]) -> list[bool]:
        """Copy the gradients here. Return which weights have one."""
        for part, gradient in zip(self.parts, gradients, strict=True):
            if gradient is not None:
                part.copy_(gradient)
        return [gradient is not None for gradient in gradients]

    def copies(self) -> list[Tensor]:
        return self._split(self.flat.clone())

    def _split(self, flat: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class _Graph:
    """The captured forward and backward passes of one shape, with their static inputs and outputs."""

    def __init__(
        self, passes: Passes, inputs: Sequence[Tensor], weights: Sequence[Tensor], weight_gradients: _WeightGradients,
        pool: Any,
    ):  # fmt: skip
        self.inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        self.weight_gradients = weight_gradients
        wanted = [self.inputs[0], *weights] if inputs[0].requires_grad else [*weights]
        self._warm_up(passes, wanted)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool):
            output = passes(*self.inputs)
        self.output_gradient = torch.empty_like(output)
        with torch.cuda.graph(self.backward, pool=pool):
            gradients = list(torch.autograd.grad(output, wanted, self.output_gradient, allow_unused=True))
            self.input_gradient = gradients.pop(0) if inputs[0].requires_grad else None
            self.has_gradient = weight_gradients.store(gradients)
        self.output = output.detach()

    def _warm_up(self, passes: Passes, wanted: list[Tensor]) -> None:
        """Run once on another stream: what kernels set up on their first run must not be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = passes(*self.inputs)
            torch.autograd.grad(output, wanted, torch.zeros_like(output), allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, token: _ReplayToken, inputs: Tensor, *weights: Tensor) -> Tensor:
        ctx.graph, ctx.token = graph, token
        graph.forward.replay()
        return graph.output.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.token is None:
            raise RuntimeError("A replayed graph can run backward only once. Set lm.acceleration.cuda_graphs = False.")
        graph: _Graph = ctx.graph
        graph.output_gradient.copy_(gradient)
        graph.backward.replay()
        ctx.token = None
        input_gradient = None if graph.input_gradient is None else graph.input_gradient.clone()
        copies = graph.weight_gradients.copies()
        weight_gradients = [copy if has else None for copy, has in zip(copies, graph.has_gradient, strict=True)]
        return None, None, input_gradient, *weight_gradients
