"""Prefill: run prompts and the thoughts that follow them into a KV cache.

Shapes: B questions, T columns of the prompts, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    `reserve`: how many columns the cache will take afterwards.
    """
    cache = lm.new_cache(input_ids.shape[1] + num_thoughts + reserve)
    is_token_BT = attention_mask.bool()
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
    embeds_BTD = lm.base.get_input_embeddings()(input_ids)
    num_skipped = input_ids.shape[1] - 1
    last_BD = lm.hidden_states(embeds_BTD, is_token_BT, positions_BT, cache, num_skipped=num_skipped)[:, -1]
    fed: list[Tensor] = []
    thinking_B = torch.ones_like(is_token_BT[:, 0])
    counts_B = torch.zeros_like(positions_BT[:, 0])
    keyed_BKD = None
    if noise and random_keys is not None:
        keyed_BKD = normal(random_keys, Stream.thoughts, num_thoughts, embeds_BTD.shape[2]).to(embeds_BTD)
    for k in range(num_thoughts):
        thought_BD = (lm.feedback(last_BD) if thoughts is None else thoughts[:, k]).to(embeds_BTD)
        if noise:
            normal_BD = torch.randn_like(thought_BD) if keyed_BKD is None else keyed_BKD[:, k]
            thought_BD = thought_BD + noise * normal_BD
        fed.append(thought_BD)
        counts_B += thinking_B
        is_token_BT = torch.cat([is_token_BT, torch.ones_like(is_token_BT[:, :1])], dim=1)
        positions_B1 = positions_BT[:, -1:] + k + 1
        last_BD = lm.hidden_states(thought_BD[:, None], is_token_BT, positions_B1, cache)[:, -1]
        if stop is not None:
            thinking_B = thinking_B & ~stop(thought_BD)
            if not thinking_B.any():
                break
    thoughts_BKD = torch.stack(fed, dim=1) if fed else embeds_BTD[:, :0]
    return ThoughtState(cache, thoughts_BKD, counts_B, last_BD)
