"""A KV cache after the prompts of a batch, which can be copied and extended by more columns.

Shapes: B rows, T columns so far, L further columns, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coconut.generation.thoughts import think
from coconut.models.latent_lm import LatentLM


@dataclass
class Context:
    """A KV cache with its attention mask (B, T) and the next position id of each row (B,)."""

    cache: Any
    is_token_BT: Tensor
    next_B: Tensor

    @classmethod
    def after(cls, lm: LatentLM, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Context, Tensor]:
        """The context after prompts (B, T), padded on the left, and their `LatentLM.source_states` (B, E)."""
        state = think(lm, ids_BT, mask_BT, 0)
        return cls(state.cache, mask_BT.bool(), mask_BT.sum(1)), state.sources

    def select(self, rows: Sequence[int]) -> Context:
        """Copy these rows, which may repeat, to a new context."""
        index, cache = torch.tensor(rows, device=self.next_B.device), copy(self.cache)
        cache.batch_select_indices(index)
        return Context(cache, self.is_token_BT[index], self.next_B[index])

    def fork(self) -> Context:
        """A copy that can be extended without changing this context."""
        return Context(copy(self.cache), self.is_token_BT, self.next_B)

    def extend(self, lm: LatentLM, embeds_BLD: Tensor) -> Tensor:
        """Run L more columns of input embeddings. Gives their source states (B, L, E)."""
        B, L = embeds_BLD.shape[:2]
        self.is_token_BT = torch.cat([self.is_token_BT, self.is_token_BT.new_ones(B, L)], dim=1)
        positions_BL = self.next_B[:, None] + torch.arange(L, device=self.next_B.device)
        positions_BL = positions_BL.clamp(max=lm.max_sequence_length - 1)  # of padding behind the end of a row
        self.next_B = self.next_B + L
        return lm.source_states(embeds_BLD, self.is_token_BT, positions_BL, self.cache)
