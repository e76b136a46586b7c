"""Linear layers: faster matrix products on a CPU, and weight gradients that are computed once for all passes.

onednn_linear: torch multiplies float32 matrices on a CPU with its BLAS. oneDNN, which torch ships and uses for
bfloat16, is slightly faster for many rows and much faster for the few rows of a thought or a generated token.

deferred_weight_gradients: autograd computes one weight gradient for every pass and sums them, each as large as the
weight. For a thought, which is one token a row, this costs several times as much as the thought itself. Here each pass
saves its inputs and output gradients, and the backward pass of the weight, which runs last, computes the sum with two
matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut.acceleration.gelu import PRE_GELU_ATTR, fused_gelu
from coconut.acceleration.patching import patched_forwards
from coconut.utils.torch_utils import apply, compute_dtype, differentiable_once

MIN_WEIGHT_NUMEL = 2**19  # at least 1; for smaller weights the overhead exceeds the gain


def onednn_linear(module: nn.Module, inputs: Tensor) -> AbstractContextManager[None]:
    """Compute the large linear layers of `module` with oneDNN if `inputs` are float32 on a CPU."""
    if not _onednn_applies(inputs):
        return nullcontext()
    return patched_forwards((layer, _layer_forward(layer, onednn=True)) for layer in _large_layers(module))


def deferred_weight_gradients(model: PreTrainedModel, onednn: bool) -> AbstractContextManager[None]:
    """Compute the weight gradients of large linear layers, except the head, once for all passes in this context.

    `onednn`: whether their products may use oneDNN.
    """
    head = model.get_output_embeddings()
    trained = (layer for layer in _large_layers(model) if layer is not head and layer.weight.requires_grad)
    return patched_forwards((layer, _layer_forward(layer, onednn)) for layer in trained)


def _large_layers(module: nn.Module) -> Iterator[Any]:
    """Plain linear layers with large weights whose forward method nothing else has replaced.

    Weights that ZeRO 3 partitions are left out. They are marked with `ds_id`, and reading them as an attribute would
    gather them, hence `_parameters`.
    """
    for layer in module.modules():
        if type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer):
            weight = layer._parameters.get("weight")
            if type(weight) is nn.Parameter and weight.numel() >= MIN_WEIGHT_NUMEL and not hasattr(weight, "ds_id"):
                yield layer


def _layer_forward(layer: Any, onednn: bool) -> Callable[[Tensor], Tensor]:
    """A forward function for the layer. All its calls share one weight gradient, if the weight is trained."""
    transposed = isinstance(layer, nn.Linear)
    uses = _Uses(transposed) if layer.weight.requires_grad and torch.is_grad_enabled() else None
    weights: dict[torch.dtype, Tensor] = {}

    def cast_weight(dtype: torch.dtype) -> Tensor:
        if uses is not None:
            return apply(_Weight, layer.weight, dtype, uses)
        return layer.weight.to(dtype).t() if transposed else layer.weight.to(dtype)

    def forward(inputs: Tensor) -> Tensor:
        dtype = compute_dtype(layer.weight)
        if dtype not in weights:
            weights[dtype] = cast_weight(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        inputs = inputs.to(dtype)
        return apply(_Linear, inputs, weights[dtype], bias, uses, getattr(inputs, PRE_GELU_ATTR, None), onednn)

    return forward


class _Uses:
    """The inputs (rows, in) and output gradients (rows, out) of each use of a weight in one backward pass."""

    def __init__(self, transposed: bool):
        self.transposed = transposed
        self._uses: list[tuple[Tensor, Tensor]] = []
        self._backward_id = -1

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        backward_id = torch._C._current_graph_task_id()
        if self._backward_id != backward_id:
            self._backward_id, self._uses = backward_id, []
        self._uses.append((inputs.detach(), gradient))

    def weight_gradient(self) -> Tensor | None:
        """One product for the largest use, one for all others together."""
        uses, self._uses = sorted(self._uses, key=lambda use: -len(use[0])), []
        if not uses:
            return None
        total = torch.mm(*self._factors(*uses[0]))
        if uses[1:]:
            inputs, gradients = (torch.cat(part) for part in zip(*uses[1:], strict=True))
            total.addmm_(*self._factors(inputs, gradients))
        return total

    def _factors(self, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return (gradient.t(), inputs) if self.transposed else (inputs.t(), gradient)


class _Weight(torch.autograd.Function):
    """A layer's weight as (in, out), in the dtype of the computation. Its backward pass computes the whole gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, uses: _Uses) -> Tensor:
        ctx.uses, ctx.dtype = uses, weight.dtype
        ctx.set_materialize_grads(False)
        cast = weight.to(dtype) if weight.dtype != dtype else weight.view_as(weight)
        return cast.t() if uses.transposed else cast

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, _: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = ctx.uses.weight_gradient()
        return None if gradient is None else gradient.to(ctx.dtype), None, None


class _Linear(torch.autograd.Function):
    """inputs (..., in) times weight (in, out) plus bias (out,). The weight's gradient goes through `uses`.

    `uses` is None if the weight is not trained. `pre_gelu`: what the inputs are the GELU of; saved in their place.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, uses: _Uses | None, pre_gelu: Tensor | None,
        onednn: bool,
    ) -> Tensor:  # fmt: skip
        saved = None if uses is None else inputs if pre_gelu is None else pre_gelu
        ctx.save_for_backward(saved, weight)
        ctx.uses, ctx.recompute_gelu, ctx.onednn = uses, pre_gelu is not None, onednn
        return matmul(inputs, weight, bias, onednn=onednn)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[1])
        if ctx.uses is not None:
            inputs = fused_gelu(saved) if ctx.recompute_gelu else saved
            ctx.uses.add(inputs.reshape(-1, weight.shape[0]), rows)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = matmul(rows, weight.t(), onednn=ctx.onednn).view(*gradient.shape[:-1], len(weight))
        return input_gradient, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None, None


def matmul(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, onednn: bool = True) -> Tensor:
    """(..., in) times (in, out) plus (out,); with oneDNN where it applies, if it is allowed."""
    rows = inputs.reshape(-1, weight.shape[0])
    if onednn and _onednn_applies(inputs):
        product = torch.ops.mkldnn._linear_pointwise.default(rows, weight.t(), bias, "none", [], "")
    else:
        product = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    # Some models change the output in place, which autograd refuses for a view that a Function returns.
    return torch.ops.aten._unsafe_view.default(product, [*inputs.shape[:-1], weight.shape[1]])


def _onednn_applies(inputs: Tensor) -> bool:
    """Whether torch would multiply these inputs with its BLAS, and oneDNN is available."""
    onednn: Any = torch.backends.mkldnn
    uses_blas = inputs.device.type == "cpu" and compute_dtype(inputs) == torch.float32
    return uses_blas and onednn.is_available() and onednn.enabled
