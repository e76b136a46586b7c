"""What the last layer makes of columns that nobody reads is left out.

A column reaches others by its keys and values alone, and after the last layer there are none. Of a question nothing is
read but where a thought or the first word of the answer comes from: in the last layer its other columns need no more
than their keys and values. Their queries, what attention makes of them, and the feed-forward part are left out.

Shapes: B rows, H heads, T columns of a pass, S columns that they see, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from coconut.acceleration.attention import SDPAOverride
from coconut.acceleration.patching import patched_forwards

Forward = Callable[..., Any]
ATTENTION = ("attn", "self_attn", "attention", "self_attention")  # what families call it, and its last product
OUTPUT = ("c_proj", "o_proj", "dense", "out_proj")
FEED_FORWARD = "mlp"


@dataclass(frozen=True)
class FinalLayer:
    """The names of those parts of the last layer that work on each column by itself, and of its attention.

    Where experts are in the feed-forward part, or it is in the layer itself (OPT), that is not among them.
    """

    by_column: tuple[str, ...]
    attention: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> FinalLayer:
        modules = dict(model.named_modules())
        layers = [name for name, part in modules.items() if isinstance(part, GradientCheckpointingLayer)]
        last = layers[-1] if layers else ""
        attention = tuple(name for part in ATTENTION if (name := f"{last}.{part}") in modules)
        outputs = [name for one in attention for part in OUTPUT if (name := f"{one}.{part}") in modules]
        inner = f"{last}.{FEED_FORWARD}"
        return cls((*outputs, *([inner] if inner in modules and _dense(modules[inner]) else ())), attention)

    def skip_positions(self, model: PreTrainedModel, columns: int) -> AbstractContextManager[None]:
        """Within, it makes nothing of the first so many columns of a pass but keys and values: zeros, mostly."""
        ways = {**dict.fromkeys(self.by_column, _by_column), **dict.fromkeys(self.attention, _attending)}
        parts = ((model.get_submodule(name), way) for name, way in ways.items())
        return patched_forwards((part, partial(way, columns, part.forward)) for part, way in parts)


def _dense(part: nn.Module) -> bool:
    """No experts: all that it has learned is in linear layers, one after the other."""
    modules = list(part.modules())
    linear = {weight for module in modules if isinstance(module, (nn.Linear, Conv1D)) for weight in module.parameters()}
    return set(part.parameters()) <= linear and not any(isinstance(module, nn.ModuleList) for module in modules)


def _by_column(columns: int, own: Forward, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`given` and what is made of it are (B, T, ...)."""
    return pad(own(given[:, columns:].contiguous(), *args, **kwargs), (0, 0, columns, 0))


def _attending(columns: int, own: Forward, *args: Any, **kwargs: Any) -> Any:
    with SDPAOverride(partial(_of_later_queries, columns)):
        return own(*args, **kwargs)


def _of_later_queries(
    columns: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    """(B, H, T, D), zeros for the first so many columns."""
    T, S = query.shape[-2], key.shape[-2]
    if attn_mask is not None and attn_mask.shape[-2] == T:
        attn_mask = attn_mask[..., columns:, :]
    if is_causal and (T - columns > 1 or T != S):
        attn_mask = torch.ones(T - columns, S, dtype=torch.bool, device=query.device).tril(columns)
    later = scaled_dot_product_attention(query[..., columns:, :], key, value, attn_mask, dropout_p, **how)
    return pad(later.transpose(1, 2), (0, 0, 0, 0, columns, 0)).transpose(1, 2)
