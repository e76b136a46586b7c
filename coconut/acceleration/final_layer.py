"""Skip the work of the last decoder layer at positions whose hidden state is not used.

A position influences others only through its keys and values, and no layer follows the last one. Of a question only
the hidden states before a thought or an answer token are read. At its other positions the last layer has to compute
keys and values only: no queries, no attention output, no feed-forward part.

Shapes: B rows, H heads, T columns of a pass, S keys, D head size.
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
ATTENTION_NAMES = ("attn", "self_attn", "attention", "self_attention")  # of the attention module, across families
OUTPUT_NAMES = ("c_proj", "o_proj", "dense", "out_proj")  # of its output projection
FEED_FORWARD_NAME = "mlp"


@dataclass(frozen=True)
class FinalLayer:
    """Names of modules in the last layer: those that work on each position alone, and the attention.

    A feed-forward part with experts, or one that is spread over the layer itself (OPT), is left out.
    """

    positionwise: tuple[str, ...]
    attention: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> FinalLayer:
        modules = dict(model.named_modules())
        layers = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
        last = layers[-1] if layers else ""
        attention = tuple(name for part in ATTENTION_NAMES if (name := f"{last}.{part}") in modules)
        outputs = [name for one in attention for part in OUTPUT_NAMES if (name := f"{one}.{part}") in modules]
        feed_forward = f"{last}.{FEED_FORWARD_NAME}"
        has_dense = feed_forward in modules and _is_dense(modules[feed_forward])
        return cls((*outputs, *([feed_forward] if has_dense else ())), attention)

    def skip_positions(self, model: PreTrainedModel, num_skipped: int) -> AbstractContextManager[None]:
        """Compute only keys and values for the first `num_skipped` positions. Their hidden states are meaningless."""
        patches = {**dict.fromkeys(self.positionwise, _positionwise), **dict.fromkeys(self.attention, _attention)}
        modules = ((model.get_submodule(name), patch) for name, patch in patches.items())
        return patched_forwards((module, partial(patch, num_skipped, module.forward)) for module, patch in modules)


def _is_dense(module: nn.Module) -> bool:
    """Whether all parameters are in linear layers and there is no list of experts."""
    modules = list(module.modules())
    linear = {weight for part in modules if isinstance(part, (nn.Linear, Conv1D)) for weight in part.parameters()}
    return set(module.parameters()) <= linear and not any(isinstance(part, nn.ModuleList) for part in modules)


def _positionwise(num_skipped: int, forward: Forward, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The module's output (B, T, ...), zero at the skipped positions."""
    return pad(forward(inputs[:, num_skipped:].contiguous(), *args, **kwargs), (0, 0, num_skipped, 0))


def _attention(num_skipped: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    with SDPAOverride(partial(_attend_later_queries, num_skipped)):
        return forward(*args, **kwargs)


def _attend_later_queries(
    num_skipped: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """(B, H, T, D), zero for the skipped queries."""
    T, S = query.shape[-2], key.shape[-2]
    if attn_mask is not None and attn_mask.shape[-2] == T:
        attn_mask = attn_mask[..., num_skipped:, :]
    if is_causal and (T - num_skipped > 1 or T != S):
        attn_mask = torch.ones(T - num_skipped, S, dtype=torch.bool, device=query.device).tril(num_skipped)
    later = scaled_dot_product_attention(query[..., num_skipped:, :], key, value, attn_mask, dropout_p, **options)
    return pad(later.transpose(1, 2), (0, 0, 0, 0, num_skipped, 0)).transpose(1, 2)
