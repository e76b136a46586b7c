"""Patch modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched_forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within, each of the modules computes what stands beside it; their hooks run as always."""
    with ExitStack() as replaced:
        for part, forward in replacements:
            replaced.enter_context(_patched_forward(part, forward))
        yield


@contextmanager
def _patched_forward(part: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(part).get("forward")
    part.forward = forward
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before
