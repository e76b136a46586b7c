"""The last layer's feed-forward part is left out where nobody reads what it makes.

A column reaches others by its keys and values alone, and after the last layer there are none. Of a question nothing is
read but where a thought or the first word of the answer comes from: its other columns need no more than their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


def last_feed_forward(model: PreTrainedModel) -> str | None:
    """The name of the last layer's feed-forward part; None if experts are in it, or it is in the layer itself (OPT)."""
    modules = dict(model.named_modules())
    layers = [name for name, part in modules.items() if isinstance(part, GradientCheckpointingLayer)]
    name = f"{layers[-1]}.mlp" if layers else ""
    return name if name in modules and _dense(modules[name]) else None


def _dense(part: nn.Module) -> bool:
    """No experts: all that it has learned is in linear layers, one after the other."""
    modules = list(part.modules())
    linear = {weight for module in modules if isinstance(module, (nn.Linear, Conv1D)) for weight in module.parameters()}
    return set(part.parameters()) <= linear and not any(isinstance(module, nn.ModuleList) for module in modules)


@contextmanager
def unread(part: nn.Module, columns: int) -> Iterator[None]:
    """Within, a feed-forward part makes zeros of the first so many columns of what it is given, (B, T, D)."""
    own, before = part.forward, vars(part).get("forward")

    def forward(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return pad(own(given[:, columns:].contiguous(), *args, **kwargs), (0, 0, columns, 0))

    part.forward = forward
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before
