"""Prefill: run prompts and the thoughts that follow them into a KV cache.

Shapes: B questions, T columns of the prompts, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from coconut.generation.keyed_random import Key, Stream, normal

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class ThoughtState:
    """The state after prompts and their thoughts.

    The cache, the thoughts (B, K, D) that were fed, how many of them each row has (B,), the last hidden states (B, D).
    """

    cache: Any
    thoughts: Tensor
    counts: Tensor
    states: Tensor


class StopCriterion(Protocol):
    """Decides from the thoughts (B, D) just fed which rows stop thinking (B,)."""

    def __call__(self, thoughts_BD: Tensor, /) -> Tensor: ...


@torch.no_grad()
def think(
    lm: LatentLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_thoughts: int,
    *,
    thoughts: Tensor | None = None,
    noise: float = 0.0,
    random_keys: Sequence[Key] | None = None,
    stop: StopCriterion | None = None,
    reserve: int = 0,
) -> ThoughtState:
    """Run prompts (B, T), padded on the left, and `num_thoughts` thoughts after each of them.

    `thoughts` (B, K, D) are fed in place of the model's own. `noise`: the standard deviation of Gaussian noise that is
    added to the model's thoughts before they are fed, from torch's generator or from `random_keys`, one for each row.
    `stop`: a row ends with the first thought for which it returns True, and the loop ends when all rows have ended.
    Where the model ends its thoughts itself (`Slot.merges`), a row ends before the first one in whose place the model
    says `<eot>`.
    `reserve`: how many columns the cache will take afterwards.
    """
    cache = lm.new_cache(input_ids.shape[1] + num_thoughts + reserve)
    is_token_BT = attention_mask.bool()
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
    embeds_BTD = lm.base.get_input_embeddings()(input_ids)
    num_skipped = input_ids.shape[1] - 1
    last_BD = lm.hidden_states(embeds_BTD, is_token_BT, positions_BT, cache, num_skipped=num_skipped)[:, -1]
    if thoughts is None and num_thoughts and lm.feedback.slot.in_parallel:
        thoughts = _iterated(lm, num_thoughts, cache, last_BD, is_token_BT, positions_BT)
    fed: list[Tensor] = []
    thinking_B = torch.ones_like(is_token_BT[:, 0])
    counts_B = torch.zeros_like(positions_BT[:, 0])
    keyed_BKD = None
    if noise and random_keys is not None:
        keyed_BKD = normal(random_keys, Stream.thoughts, num_thoughts, embeds_BTD.shape[2]).to(embeds_BTD)
    ends_itself = lm.feedback.slot.merges and thoughts is None
    width = max(num_thoughts, 1) if thoughts is not None and stop is None else 1  # known thoughts are fed in one pass
    for k in range(0, num_thoughts, width):
        if ends_itself:
            thinking_B = thinking_B & ~lm.feedback.ends(last_BD, lm)
            if not thinking_B.any():
                break
        fed_BKD = lm.feedback(last_BD, lm)[:, None] if thoughts is None else thoughts[:, k : k + width]
        fed_BKD = fed_BKD.to(embeds_BTD)
        if noise:
            normal_BKD = torch.randn_like(fed_BKD) if keyed_BKD is None else keyed_BKD[:, k : k + width]
            fed_BKD = fed_BKD + noise * normal_BKD
        fed.append(fed_BKD)
        counts_B += width * thinking_B
        is_token_BT = torch.cat([is_token_BT, torch.ones_like(is_token_BT[:, :1]).expand(-1, width)], dim=1)
        positions_BK = positions_BT[:, -1:] + torch.arange(k + 1, k + 1 + width, device=lm.device)
        last_BD = lm.hidden_states(fed_BKD, is_token_BT, positions_BK, cache)[:, -1]
        if stop is not None:
            thinking_B = thinking_B & ~stop(fed_BKD[:, -1])
            if not thinking_B.any():
                break
    thoughts_BKD = torch.cat(fed, dim=1) if fed else embeds_BTD[:, :0]
    return ThoughtState(cache, thoughts_BKD, counts_B, last_BD)


def _iterated(
    lm: LatentLM, num_thoughts: int, cache: Any, last_BD: Tensor, is_token_BT: Tensor, positions_BT: Tensor
) -> Tensor:
    """(B, K, D) thoughts that are updated all at once, behind the prompts in the cache, which stays as it is."""
    is_latent_BK = torch.ones_like(is_token_BT[:, :1]).expand(-1, num_thoughts)
    tokens_D = lm.base.get_input_embeddings()(torch.tensor(lm.latent_id, device=lm.device))
    positions_BK = positions_BT[:, -1:] + torch.arange(1, num_thoughts + 1, device=lm.device)
    mask_BS = torch.cat([is_token_BT, is_latent_BK], dim=1)
    return lm.iterate_block(
        tokens_D.expand(len(last_BD), num_thoughts, -1), last_BD, is_latent_BK,
        lambda embeds_BKD: lm.hidden_states(embeds_BKD, mask_BS, positions_BK, copy(cache)),
    )[0]  # fmt: skip
