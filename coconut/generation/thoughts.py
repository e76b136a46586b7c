"""Prefill: run prompts and the thoughts that follow them into a KV cache.

Shapes: B questions, T columns of the prompts, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from coconut.generation.keyed_random import Key, Stream, normal, uniform

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class ThoughtState:
    """The state after prompts and their thoughts.

    The cache, the thoughts (B, K, D) that were fed, how many of them each row has (B,), the last hidden states (B, D),
    `means` (B, K, D), the thoughts before noise and dropout, and what a thought would be made of (B, E)
    (`LatentLM.source_states`).
    """

    cache: Any
    thoughts: Tensor
    counts: Tensor
    states: Tensor
    means: Tensor
    sources: Tensor


@dataclass(frozen=True)
class ThoughtNoise:
    """Random changes of a thought z as it is fed: mask z / (1 - dropout) + std N(0, I).

    dropout: the probability with which each number of a thought is set to 0, each independently of all others; the
        others are divided by 1 - dropout, so that the mean stays. Nothing else in the model is dropped.
    std: the standard deviation of Gaussian noise, which is added to each number after dropout.
    Both come after the projector, if there is one. Thoughts that are updated all at once are changed after their last
    update. Without dropout and noise (the default) it is false, and thoughts are fed as they are.
    """

    std: float = 0.0
    dropout: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.std or self.dropout)

    def draw(self, keys: Sequence[Key], num_thoughts: int, hidden: int) -> tuple[Tensor, Tensor]:
        """Uniform and normal numbers (B, K, D) for `apply`, from a key for each row. A longer K only adds numbers."""
        uniform_BKD = uniform(keys, Stream.dropout, num_thoughts * hidden).view(len(keys), num_thoughts, hidden)
        return uniform_BKD, normal(keys, Stream.thoughts, num_thoughts, hidden)

    def apply(self, thoughts_BKD: Tensor, drawn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The changed thoughts. `drawn`: numbers of their shape, by default from torch's generator."""
        if self.dropout:
            uniform_BKD = torch.rand(thoughts_BKD.shape, device=thoughts_BKD.device) if drawn is None else drawn[0]
            is_kept_BKD = (uniform_BKD >= self.dropout).to(thoughts_BKD.device)
            thoughts_BKD = torch.where(is_kept_BKD, thoughts_BKD / (1 - self.dropout), 0)
        if self.std:
            normal_BKD = torch.randn_like(thoughts_BKD) if drawn is None else drawn[1].to(thoughts_BKD)
            thoughts_BKD = thoughts_BKD + self.std * normal_BKD
        return thoughts_BKD


NO_NOISE = ThoughtNoise()


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
    noise: ThoughtNoise = NO_NOISE,
    random_keys: Sequence[Key] | None = None,
    stop: StopCriterion | None = None,
    soft: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    reserve: int = 0,
) -> ThoughtState:
    """Run prompts (B, T), padded on the left, and `num_thoughts` thoughts after each of them.

    `thoughts` (B, K, D) are fed in place of the model's own. `noise`: changes the model's thoughts before they are fed,
    by numbers from torch's generator or from `random_keys`, one for each row.
    `stop`: a row ends with the first thought for which it returns True, and the loop ends when all rows have ended.
    `soft`: gives the next thoughts (B, D) in place of the slot's, from the last hidden states (B, D), and which rows
    have ended before them (B,). Where the model ends its thoughts itself (`Slot.merges`), a row ends before the first
    one in whose place the model says `<eot>`, unless their number is fixed (`Reasoning.fixed_count`).
    `reserve`: how many columns the cache will take afterwards.
    """
    cache = lm.new_cache(input_ids.shape[1] + num_thoughts + reserve)
    is_token_BT = attention_mask.bool()
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
    embeds_BTD = lm.base.get_input_embeddings()(input_ids)
    num_skipped = input_ids.shape[1] - 1
    last_BE = lm.source_states(embeds_BTD, is_token_BT, positions_BT, cache, num_skipped=num_skipped)[:, -1]
    if thoughts is None and soft is None and num_thoughts and lm.feedback.slot.in_parallel:
        thoughts = _iterated(lm, num_thoughts, cache, last_BE, is_token_BT, positions_BT)
    fed: list[Tensor] = []
    means: list[Tensor] = []
    thinking_B = torch.ones_like(is_token_BT[:, 0])
    counts_B = torch.zeros_like(positions_BT[:, 0])
    drawn = noise.draw(random_keys, num_thoughts, embeds_BTD.shape[2]) if noise and random_keys is not None else None
    ending = soft
    if lm.feedback.slot.merges and thoughts is None and not lm.reasoning.fixed_count:
        ending = lm.ending_thoughts
    width = max(num_thoughts, 1) if thoughts is not None and stop is None else 1  # known thoughts are fed in one pass
    for k in range(0, num_thoughts, width):
        if ending is not None:
            next_BD, ended_B = ending(lm.last_states(last_BE))
            thinking_B = thinking_B & ~ended_B
            if not thinking_B.any():
                break
            fed_BKD = next_BD[:, None]
        else:
            fed_BKD = lm.thought(last_BE)[:, None] if thoughts is None else thoughts[:, k : k + width]
        fed_BKD = fed_BKD.to(embeds_BTD)
        means.append(fed_BKD)
        if noise:
            part = slice(k, k + width)
            fed_BKD = noise.apply(fed_BKD, drawn and (drawn[0][:, part], drawn[1][:, part]))
        fed.append(fed_BKD)
        counts_B += width * thinking_B
        is_token_BT = torch.cat([is_token_BT, torch.ones_like(is_token_BT[:, :1]).expand(-1, width)], dim=1)
        positions_BK = positions_BT[:, -1:] + torch.arange(k + 1, k + 1 + width, device=lm.device)
        last_BE = lm.source_states(fed_BKD, is_token_BT, positions_BK, cache)[:, -1]
        if stop is not None:
            thinking_B = thinking_B & ~stop(fed_BKD[:, -1])
            if not thinking_B.any():
                break
    thoughts_BKD, means_BKD = (torch.cat(parts, dim=1) if parts else embeds_BTD[:, :0] for parts in (fed, means))
    return ThoughtState(cache, thoughts_BKD, counts_B, lm.last_states(last_BE), means_BKD, last_BE)


def _iterated(
    lm: LatentLM, num_thoughts: int, cache: Any, last_BE: Tensor, is_token_BT: Tensor, positions_BT: Tensor
) -> Tensor:
    """(B, K, D) thoughts that are updated all at once, behind the prompts in the cache, which stays as it is."""
    is_latent_BK = torch.ones_like(is_token_BT[:, :1]).expand(-1, num_thoughts)
    tokens_D = lm.base.get_input_embeddings()(torch.tensor(lm.latent_id, device=lm.device))
    positions_BK = positions_BT[:, -1:] + torch.arange(1, num_thoughts + 1, device=lm.device)
    mask_BS = torch.cat([is_token_BT, is_latent_BK], dim=1)
    return lm.iterate_block(
        tokens_D.expand(len(last_BE), num_thoughts, -1), last_BE, is_latent_BK,
        lambda embeds_BKD: lm.source_states(embeds_BKD, mask_BS, positions_BK, copy(cache)),
    )[0]  # fmt: skip
