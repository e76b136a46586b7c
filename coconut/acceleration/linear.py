"""Linear layers: which library makes their products, and weights that get their gradient from all passes at once.

Left to autograd, every pass makes a gradient as large as the weight and adds it to that of the others. For a thought,
one token a row, these products of a few rows cost several times what the thought itself costs. Here what the products
need is kept until the last of the passes has been gone back through; then two products serve for all of them. What
GELU made is not kept for that: it is made again from what went into GELU, which is kept anyway.

torch has its BLAS make a CPU's products in float32. oneDNN, which comes with torch and makes those in bfloat16 anyway,
is faster at them: by a little at many rows, at those of a thought or a word by half and more (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut.acceleration.patching import patched_forwards
from coconut.utils.torch_utils import compute_dtype, differentiable_once

PRE_GELU_ATTR = "before_gelu"  # an attribute of what GELU made: what went into it
MIN_WEIGHT_NUMEL = 2**19  # numbers in a weight (at least 1); below it what is saved here costs less than the saving


def fused_gelu(given: Tensor) -> Tensor:
    """GPT-2's GELU in one kernel."""
    return nn.functional.gelu(given, approximate="tanh")


class FusedGelu(nn.Module):
    """A linear layer that follows it need not keep what it is given."""

    def forward(self, given: Tensor) -> Tensor:
        made = fused_gelu(given)
        if torch.is_grad_enabled():
            setattr(made, PRE_GELU_ATTR, given)
        return made


def _by_onednn(given: Tensor) -> bool:
    """Whether torch would have its BLAS make products of this, and oneDNN is there."""
    onednn: Any = torch.backends.mkldnn
    by_blas = given.device.type == "cpu" and compute_dtype(given) == torch.float32
    return by_blas and onednn.is_available() and onednn.enabled


def _product(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) times a weight (in, out), however it lies in memory, and the bias (out,) added: (..., out)."""
    rows = given.reshape(-1, weight.shape[0])
    if _by_onednn(given):
        made = torch.ops.mkldnn._linear_pointwise.default(rows, weight.t(), bias, "none", [], "")
    else:
        made = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    # A view that a Function gives back must not be changed in place, and some models do that.
    return torch.ops.aten._unsafe_view.default(made, [*given.shape[:-1], weight.shape[1]])


class _Uses:
    """What went into a layer (rows, in) and the gradient of what came out (rows, out), for each use."""

    def __init__(self, transposed: bool):
        self.transposed = transposed
        self._found: list[tuple[Tensor, Tensor]] = []
        self._backward = -1

    def add(self, given: Tensor, gradient: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if self._backward != backward:
            self._backward, self._found = backward, []
        self._found.append((given.detach(), gradient))

    def product(self) -> Tensor | None:
        """The gradient of the weight: the largest use by itself, the others as one."""
        found, self._found = sorted(self._found, key=lambda use: -len(use[0])), []
        if not found:
            return None
        total = torch.mm(*self._factors(*found[0]))
        if found[1:]:
            given, gradients = (torch.cat(part) for part in zip(*found[1:], strict=True))
            total.addmm_(*self._factors(given, gradients))
        return total

    def _factors(self, given: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return (gradient.t(), given) if self.transposed else (given.t(), gradient)


class _Weight(torch.autograd.Function):
    """A layer's weight in the type that it computes in; (in, out), however the layer keeps it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, uses: _Uses) -> Tensor:
        ctx.uses, ctx.dtype = uses, weight.dtype
        ctx.set_materialize_grads(False)
        kept = weight.to(dtype) if weight.dtype != dtype else weight.view_as(weight)
        return kept.t() if uses.transposed else kept

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, _: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = ctx.uses.product()
        return None if found is None else found.to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    """`uses` of None: the weight is not trained."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, uses: _Uses | None, before_gelu: Tensor | None
    ) -> Tensor:
        kept = None if uses is None else given if before_gelu is None else before_gelu
        ctx.save_for_backward(kept, weight)
        ctx.uses, ctx.gelu_again = uses, before_gelu is not None
        return _product(given, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[1])
        if ctx.uses is not None:
            made = fused_gelu(given) if ctx.gelu_again else given
            ctx.uses.add(made.reshape(-1, weight.shape[0]), rows)
        back = _product(rows, weight.t()).view(*gradient.shape[:-1], len(weight)) if ctx.needs_input_grad[0] else None
        return back, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _used(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass, for as many passes as come. What they need for the weight is kept if it is trained."""
    transposed = isinstance(layer, nn.Linear)
    uses = _Uses(transposed) if layer.weight.requires_grad and torch.is_grad_enabled() else None
    weights: dict[torch.dtype, Tensor] = {}

    def in_type(dtype: torch.dtype) -> Tensor:
        if uses is not None:
            return _apply(_Weight, layer.weight, dtype, uses)
        return layer.weight.to(dtype).t() if transposed else layer.weight.to(dtype)

    def forward(given: Tensor) -> Tensor:
        dtype = compute_dtype(layer.weight)
        if dtype not in weights:
            weights[dtype] = in_type(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        taken = given.to(dtype)
        return _apply(_Product, taken, weights[dtype], bias, uses, getattr(taken, PRE_GELU_ATTR, None))

    return forward


def _apply(function: Any, *arguments: Any) -> Tensor:
    return function.apply(*arguments)


def deferred_weight_gradients(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within, the linear layers whose weights are trained compute as always; the passes' gradients come as one."""
    head = model.get_output_embeddings()
    trained = (layer for layer in _large(model) if layer is not head and layer.weight.requires_grad)
    return patched_forwards((layer, _used(layer)) for layer in trained)


def onednn_linear(part: nn.Module, given: Tensor) -> AbstractContextManager[None]:
    """Within, the linear layers of `part` compute as always, by the library that pays for products of `given`."""
    if not _by_onednn(given):
        return nullcontext()
    return patched_forwards((layer, _used(layer)) for layer in _large(part))


def _large(part: nn.Module) -> Iterator[Any]:
    """Those with large weights that are torch's own and here, and that nothing else has taken over.

    ZeRO 3 puts a weight's parts together for each pass, at once if it is asked for as an attribute, and then marks it.
    """
    for layer in part.modules():
        if type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer):
            weight = layer._parameters.get("weight")
            if type(weight) is nn.Parameter and weight.numel() >= MIN_WEIGHT_NUMEL and not hasattr(weight, "ds_id"):
                yield layer


@contextmanager
def sparse_embedding_gradient(model: PreTrainedModel) -> Iterator[None]:
    """Within, looking up embeddings gives a gradient for the rows that were looked up, if the table is the head's, too.

    Added to the head's gradient, which is there first and as large as the table, it needs no other of that size. On a
    CPU, and where the table is all here; what is looked up has to reach the loss by way of the head.
    """
    table: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    pays = (
        type(table) is nn.Embedding
        and getattr(head, "weight", None) is table.weight
        and table.weight.device.type == "cpu"
        and table.weight.numel() > 0
        and torch.is_grad_enabled()
    )
    if not pays:
        yield
        return
    before, table.sparse = table.sparse, True
    try:
        yield
    finally:
        table.sparse = before
