"""What training asks of an engine.

An engine is given an `nn.Module` and a loss function. It knows neither models, data nor methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class MicroBatch(Protocol):
    """A part of an update."""

    @property
    def num_targets(self) -> int: ...

    def to(self, device: torch.device | str) -> Any: ...


LossFunction = Callable[[nn.Module, Any], torch.Tensor]  # the loss summed over the targets of a micro-batch


@dataclass(frozen=True)
class Update:
    """`loss`: mean over all targets of the update. `grad_norm`: before clipping."""

    loss: float
    grad_norm: float
    num_targets: int


class NonFinite(ArithmeticError):
    """A loss or gradient that is not finite. No weight was changed. `culprits` names where it was seen."""

    def __init__(self, loss: float, grad_norm: float, culprits: list[str]):
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.loss, self.grad_norm, self.culprits = loss, grad_norm, culprits


class Engine(Protocol):
    device: torch.device

    def reset_optimizer(self) -> None:
        """Make the optimizer anew: no moments, no step count."""
        ...

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> Update:
        """One update: the mean of the loss over all targets of all micro-batches. Raises NonFinite."""
        ...

    def rehearse(self, micro_batch: MicroBatch) -> None:
        """Forward and backward without an update: fails now if memory does not suffice."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and random number generators, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
