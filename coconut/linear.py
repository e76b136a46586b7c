"""Linear layers that are used in several passes, whose weights get their gradient from all passes at once.

Left to autograd, every pass makes a gradient as large as the weight and adds it to that of the others. For a thought,
one token a row, these products of a few rows cost several times what the thought itself costs. Here what the products
need is kept until the last of the passes has been gone back through; then two products serve for all of them. What
GELU made is not kept for that: it is made again from what went into GELU, which is kept anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BEFORE = "before_gelu"  # an attribute of what GELU made: what went into it
LEAST = 2**19  # numbers in a weight (at least 1); below it the products that are saved cost less than the saving


def fused_gelu(given: Tensor) -> Tensor:
    """GPT-2's GELU in one kernel."""
    return nn.functional.gelu(given, approximate="tanh")


class FusedGelu(nn.Module):
    """A linear layer that follows it need not keep what it is given."""

    def forward(self, given: Tensor) -> Tensor:
        made = fused_gelu(given)
        if torch.is_grad_enabled():
            setattr(made, BEFORE, given)
        return made


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
        self._found.append((given, gradient))

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
    @once_differentiable
    def backward(ctx: Any, _: None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = ctx.uses.product()
        return None if found is None else found.to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, uses: _Uses, before_gelu: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(given if before_gelu is None else before_gelu, weight)
        ctx.uses, ctx.has_bias, ctx.gelu_again = uses, bias is not None, before_gelu is not None
        rows = given.reshape(-1, given.shape[-1])
        made = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return made.view(*given.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given, weight = ctx.saved_tensors
        if ctx.gelu_again:
            given = fused_gelu(given)
        rows = gradient.reshape(-1, gradient.shape[-1])
        ctx.uses.add(given.reshape(-1, given.shape[-1]), rows)
        back = torch.mm(rows, weight.t()).view(given.shape) if ctx.needs_input_grad[0] else None
        return back, None, rows.sum(0) if ctx.has_bias else None, None, None


def _used(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass, for as many passes as come."""
    uses = _Uses(transposed=isinstance(layer, nn.Linear))
    weights: dict[torch.dtype, Tensor] = {}

    def forward(given: Tensor) -> Tensor:
        kind = given.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
        if dtype not in weights:
            weights[dtype] = _apply(_Weight, layer.weight, dtype, uses)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        taken = given.to(dtype)
        return _apply(_Product, taken, weights[dtype], bias, uses, getattr(taken, BEFORE, None))

    return forward


def _apply(function: Any, *arguments: Any) -> Tensor:
    return function.apply(*arguments)


@contextmanager
def weights_summed_once(model: PreTrainedModel) -> Iterator[None]:
    """Within, the linear layers whose weights are trained compute as always; the passes' gradients come as one."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head and _pays(m)]
    for layer in layers:
        layer.forward = _used(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _pays(layer: Any) -> bool:
    """Trained, large, here (ZeRO 3 puts its parts together for each pass), and not taken over by something else."""
    return layer.weight.requires_grad and layer.weight.numel() >= LEAST and "forward" not in vars(layer)


@contextmanager
def rows_added(model: PreTrainedModel) -> Iterator[None]:
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
