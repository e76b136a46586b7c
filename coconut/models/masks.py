"""Attention masks: which of a pass's and earlier columns each query may attend to.

Shapes: B rows, T columns of a pass (the queries), S columns of the pass and of all before it (the keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from coconut.models.families import text_config


def after_last_token(is_token: Tensor) -> Tensor:
    """The padding at the end of each row. No token attends to it; a mask that includes it is often plainly causal."""
    return is_token.long().flip(1).cumsum(1).flip(1) == 0


def unmask_padding(model: PreTrainedModel, mask_BS: Tensor, embeds: Tensor) -> Tensor:
    """The mask (B, S) for a pass over `embeds` (B, T, hidden), in which padding attends to itself where it has to."""
    masked = has_fully_masked_query(model, mask_BS, embeds)
    return attend_to_self_mask(mask_BS, embeds) if masked else mask_BS.long()


def has_fully_masked_query(model: PreTrainedModel, mask_BS: Tensor, embeds: Tensor) -> bool:
    """Whether a query of the pass over `embeds` (B, T, hidden) may attend to nothing, in torch's attention on a GPU.

    Padding at the head of a row is such a query. Its gradients were NaN (H100, bfloat16, torch 2.11). While a CUDA
    graph is captured, values cannot be read, and the answer is yes.
    """
    if embeds.device.type != "cuda" or model.config._attn_implementation != "sdpa":
        return False
    until_first = mask_BS[:, : mask_BS.shape[1] - embeds.shape[1] + 1].bool()
    return torch.cuda.is_current_stream_capturing() or not bool(until_first.any(1).all())


def attend_to_self_mask(mask_BS: Tensor, embeds: Tensor) -> Tensor:
    """(B, 1, T, S) the causal mask in which every query, of padding too, attends to itself."""
    columns_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    queries_T1 = columns_S[-embeds.shape[1] :, None]
    visible_BTS = mask_BS.bool()[:, None] & (columns_S <= queries_T1)
    return (visible_BTS | (columns_S == queries_T1))[:, None]


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding windows of `size` tokens in every layer, or (`mixed`) in those that config.layer_types names.

    transformers counts a window in columns. That is wrong where padding stands between a row's tokens; there the masks
    below count tokens.
    """

    size: int
    mixed: bool

    @classmethod
    def of(cls, base: PreTrainedModel) -> SlidingWindow | None:
        """None if no layer has one."""
        layers = DynamicCache(config=text_config(base)).layers
        sizes = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        if not sizes:
            return None
        mixed = not all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
        return cls(min(sizes), mixed)

    def needs_masks(self, is_token: Tensor) -> bool:
        """Whether transformers' own masks would be wrong for these rows.

        They are if a row is longer than the window and has padding between its tokens, or, on a GPU, if a row begins
        with padding (`has_fully_masked_query`).
        """
        columns = torch.arange(is_token.shape[1], device=is_token.device)
        last = torch.where(is_token, columns, -1).amax(1)
        first = torch.where(is_token, columns, len(columns)).amin(1)
        has_inner_padding = (last - first + 1 > is_token.sum(1)).any()
        fully_masked = is_token.device.type == "cuda" and not is_token[:, 0].all()
        return bool(fully_masked) or (is_token.shape[1] > self.size and bool(has_inner_padding))

    def masks(self, is_token: Tensor, positions: Tensor, start: int, dtype: torch.dtype) -> Any:
        """Masks for the queries from column `start` on, as the base takes them; `is_token`, `positions`: (B, S)."""
        columns = torch.arange(is_token.shape[1], device=is_token.device)
        causal = is_token[:, None, :] & (columns <= columns[start:, None])
        near = positions[:, start:, None] - positions[:, None, :] < self.size
        kinds = {"full_attention": causal, "sliding_attention": causal & near}
        zero = torch.zeros((), dtype=dtype, device=is_token.device)
        masks = {kind: zero.where(visible, torch.finfo(dtype).min)[:, None] for kind, visible in kinds.items()}
        return masks if self.mixed else masks["sliding_attention"]
