"""Scaled dot-product attention (SDPA) on a CPU: a cheaper backward pass for one query, and queries stored compactly.

One query: torch's CPU kernel is made for blocks of queries. For the single query of a thought its backward pass in
bfloat16 takes several times as long as reading the keys and values and writing their gradients. `_OneQuery` writes
the few products out. In float32 torch's kernel is as fast and is used.

Compact queries: some models compute queries, keys and values in one product, and SDPA saves the query as a view that
keeps all three in memory, although the KV cache has its own copy of keys and values. There the query is copied.

Shapes: B rows, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from coconut.utils.torch_utils import apply, compute_dtype, differentiable_once


class SDPAOverride(TorchFunctionMode):
    """Call `attend` wherever this thread calls torch's scaled_dot_product_attention."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.attend if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def patched_sdpa(embeds: Tensor, cached: bool) -> AbstractContextManager[Any]:
    """Use this module's attention in a training pass over `embeds` (B, T, hidden), with a KV cache or without.

    Applies to passes of one column in half precision on a CPU, and to passes of several columns with a cache.
    """
    if embeds.shape[1] == 1:
        applies = embeds.device.type == "cpu" and compute_dtype(embeds).itemsize == 2
    else:
        applies = cached
    return SDPAOverride(_attend) if applies and torch.is_grad_enabled() else nullcontext()


def own_storage(query: Tensor) -> Tensor:
    """The query (B, H, T, D), copied if it is a view of a tensor at least twice as large."""
    is_small_view = 2 * query.nbytes <= query.untyped_storage().nbytes()
    return query.transpose(1, 2).contiguous().transpose(1, 2) if is_small_view else query


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    half = query.dtype.itemsize == 2 and query.device.type == "cpu"
    one_query = half and query.dim() == 4 and query.shape[-2] == 1 and query.shape[:2] == key.shape[:2]
    plain = not (dropout_p or is_causal) and not getattr(attn_mask, "requires_grad", False)
    same_dtype = query.dtype == key.dtype == value.dtype == compute_dtype(query)
    if one_query and plain and same_dtype and query.requires_grad:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return apply(_OneQuery, query, key, value, attn_mask, scale)
    return scaled_dot_product_attention(
        own_storage(query), key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _OneQuery(torch.autograd.Function):
    """softmax(key query^T scale + mask) value: (B, H, 1, D), as `query` is; `key` and `value` are (B, H, S, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        scores_BHS1 = torch.matmul(key, query.transpose(-1, -2)).float() * scale
        if mask is not None and mask.dtype == torch.bool:
            scores_BHS1.masked_fill_(~mask.transpose(-1, -2), torch.finfo(torch.float32).min)
        elif mask is not None:
            scores_BHS1 += mask.transpose(-1, -2)
        weights_BHS1 = scores_BHS1.softmax(-2).to(value.dtype)
        ctx.save_for_backward(query, key, value, weights_BHS1)
        ctx.scale = scale
        return torch.matmul(weights_BHS1.transpose(-1, -2), value)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, weights_BHS1 = ctx.saved_tensors
        grad_weights_BHS1 = torch.matmul(value, gradient.transpose(-1, -2))
        mean_BH11 = (weights_BHS1 * grad_weights_BHS1).sum(-2, keepdim=True)
        grad_scores_BHS1 = weights_BHS1 * (grad_weights_BHS1 - mean_BH11) * ctx.scale
        grad_query = torch.matmul(grad_scores_BHS1.transpose(-1, -2), key)
        return grad_query, grad_scores_BHS1 * query, weights_BHS1 * gradient, None, None
