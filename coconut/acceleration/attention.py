"""What torch's attention needs from us: on a CPU a form for one query a row, on a GPU queries that see something.

torch's kernel for CPUs is made for blocks of queries; with one, as a thought has it, its backward pass takes several
times as long in bfloat16 as reading keys and values and writing their gradients (docs/performance.md). There the few
products are written out. In float32 that brings nothing, and torch's is left alone.

Where a model makes queries, keys and values in one product, what attention keeps of the queries is a view that keeps
all three, while the cache has keys and values of its own: there the queries are copied.

On a GPU a query without a key, as padding at the head of a row is, gave gradients that were NaN (H100, bfloat16, torch
2.11; a few such queries alone did not show it). There padding sees itself.

Shapes: B rows, H heads, S columns, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from coconut.utils.torch_utils import compute_dtype, differentiable_once


class _OneQuery(torch.autograd.Function):
    """softmax(key query^T scale + mask) value, (B, H, 1, D) as `query` is; `key` and `value` are (B, H, S, D)."""

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
        of_weights_BHS1 = torch.matmul(value, gradient.transpose(-1, -2))
        mean_BH11 = (weights_BHS1 * of_weights_BHS1).sum(-2, keepdim=True)
        of_scores_BHS1 = weights_BHS1 * (of_weights_BHS1 - mean_BH11) * ctx.scale
        of_query = torch.matmul(of_scores_BHS1.transpose(-1, -2), key)
        return of_query, of_scores_BHS1 * query, weights_BHS1 * gradient, None, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    half = query.dtype.itemsize == 2 and query.device.type == "cpu"
    one = half and query.dim() == 4 and query.shape[-2] == 1 and query.shape[:2] == key.shape[:2]
    plain = (
        one and query.requires_grad and not (dropout_p or is_causal) and not getattr(attn_mask, "requires_grad", False)
    )
    if plain and query.dtype == key.dtype == value.dtype == compute_dtype(query):
        made = _OneQuery.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)
        assert isinstance(made, Tensor)
        return made
    return scaled_dot_product_attention(
        own_storage(query), key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class SDPAOverride(TorchFunctionMode):
    """Within, in this thread, `attend` is called where torch's attention is."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.attend if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def own_storage(query: Tensor) -> Tensor:
    """The query (B, H, T, D) in memory of its own, heads innermost, if it is a small part of what it is in."""
    small = 2 * query.nbytes <= query.untyped_storage().nbytes()
    return query.transpose(1, 2).contiguous().transpose(1, 2) if small else query


def patched_sdpa(embeds: Tensor, cached: bool) -> AbstractContextManager[Any]:
    """Within, in this thread, attention is the above. For a pass over `embeds` (B, T, D), with a cache or without.

    Nothing is changed where it brings nothing: but for passes to be gone back through, of one column on a CPU in half
    precision, or of several with a cache.
    """
    if embeds.shape[1] == 1:
        pays = embeds.device.type == "cpu" and compute_dtype(embeds).itemsize == 2
    else:
        pays = cached
    return SDPAOverride(_attend) if pays and torch.is_grad_enabled() else nullcontext()


def has_fully_masked_query(model: PreTrainedModel, mask_BS: Tensor, embeds: Tensor) -> bool:
    """Whether a query of a pass over `embeds` (B, T, D), the last T columns, may see nothing, in torch's on a GPU.

    While a CUDA graph is recorded that is not known: it may.
    """
    if embeds.device.type != "cuda" or model.config._attn_implementation != "sdpa":
        return False
    until_first = mask_BS[:, : mask_BS.shape[1] - embeds.shape[1] + 1].bool()
    return torch.cuda.is_current_stream_capturing() or not bool(until_first.any(1).all())


def attend_to_self_mask(mask_BS: Tensor, embeds: Tensor) -> Tensor:
    """(B, 1, T, S) what the last T columns see: of the tokens themselves and what is before them, of padding itself."""
    columns_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    queries_T1 = columns_S[-embeds.shape[1] :, None]
    seen_BTS = mask_BS.bool()[:, None] & (columns_S <= queries_T1)
    return (seen_BTS | (columns_S == queries_T1))[:, None]
