"""What is otherwise for a while: a module's mode, its forward pass, its type; where random numbers come from.

And what a backward pass says that cannot be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Afterwards every part of it is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, what is drawn on the CPU and on the device comes from this seed; afterwards their generators go on.

    Those of other GPUs are left alone if nothing but the CPU is named.
    """
    with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
        if device is None or device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield


def compute_dtype(given: Tensor) -> torch.dtype:
    """The type that products of it are made in: autocast's, or its own."""
    kind = given.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given.dtype


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a Function through which no second derivative goes.

    Raises RuntimeError if one is asked for (create_graph=True). torch's `once_differentiable` does so in backward()
    alone; torch.autograd.grad would leave that part out without a word.
    """

    @wraps(backward)
    def checked(*given: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True came: this pass has no second derivative. Passes without thoughts have one within "
                "torch.backends.mkldnn.flags(enabled=False), or in float64."
            )
        return backward(*given)

    return checked
