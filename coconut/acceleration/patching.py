"""Replace the forward methods of modules inside a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched_forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward method of each module by the function beside it. Hooks of the modules still run."""
    with ExitStack() as patches:
        for module, forward in replacements:
            patches.enter_context(_patched_forward(module, forward))
        yield


@contextmanager
def _patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
