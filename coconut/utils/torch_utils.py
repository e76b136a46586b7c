"""Context managers that temporarily change torch state, and small helpers for autograd functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside this context; afterwards each submodule has its earlier mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires a gradient inside this context."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the random generators of the CPU and of `device` inside this context, and restore them afterwards.

    If no GPU is given, the generators of GPUs are left alone.
    """
    with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
        if device is None or device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield


def spread_indices(count: int, limit: int) -> Tensor:
    """The indices of at most `limit` of so many items, evenly spaced."""
    chosen = min(count, limit)
    return torch.arange(chosen) * count // max(chosen, 1)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products of the tensor: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def effective_rank(rows_RD: Tensor) -> float:
    """exp of the entropy of the singular values of (R, D) (Roy and Vetterli 2007); 1 if all are 0."""
    singular = torch.linalg.svdvals(rows_RD.float())
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(shares).sum().exp().item()


def apply(function: Any, *arguments: Any) -> Tensor:
    """Call an autograd Function that returns one tensor."""
    return function.apply(*arguments)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward method of an autograd Function raise RuntimeError if a second derivative is requested.

    torch's `once_differentiable` raises it only in backward(); torch.autograd.grad silently leaves the part out.
    """

    @wraps(backward)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True came: this pass has no second derivative. Turn acceleration off: "
                "engine.acceleration=off, or in Python lm.acceleration.mechanisms = frozenset()."
            )
        return backward(*arguments)

    return checked
