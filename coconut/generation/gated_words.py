"""Decode with transformers while gates mix what was expected into each word before it is fed (HRPO, arXiv 2505.18454).

Shapes: B answers, N words fed so far, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut.models.gates import expected_embedding

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


class GatedDecoding:
    """A context around transformers' generate, and one of its logits processors, after all that forbid tokens.

    As a processor it takes the expected embedding of each step's distribution. As a hook of the input embeddings it
    mixes that into the word that was chosen, in the rows whose text has not come to the answer mark. The word that
    completes the mark is fed as it is, like those after it.
    """

    def __init__(self, lm: LatentLM, num_answers: int):
        assert lm.gates
        assert lm.reasoning.gated
        self.gates, self.tokenizer = lm.gates, lm.tokenizer
        self.temperature, self.mark = lm.reasoning.gated.temperature, lm.reasoning.format.answer_mark
        self.table: Any = lm.base.get_input_embeddings()
        self.embeds_VD: Tensor = self.table(torch.arange(self.table.num_embeddings, device=lm.device))
        self.is_reasoning_B = torch.ones(num_answers, dtype=torch.bool, device=lm.device)
        self.expected_BD: Tensor | None = None
        self.words: list[Tensor] = []
        self.fed: list[Tensor] = []

    def __enter__(self) -> GatedDecoding:
        self.hook = self.table.register_forward_hook(self._mix)
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.expected_BD = expected_embedding(scores, self.embeds_VD[: scores.shape[1]], self.temperature)
        return scores

    def _mix(self, table: Any, arguments: tuple[Tensor], embeds_B1D: Tensor) -> Tensor | None:
        if self.expected_BD is None:  # the prompt
            return None
        self.words.append(arguments[0][:, -1])
        self.is_reasoning_B &= ~self._has_mark()
        is_reasoning_B1 = self.is_reasoning_B[:, None]
        self.fed.append(torch.where(is_reasoning_B1, self.expected_BD, 0))
        mixed_B1D = self.gates(embeds_B1D, self.expected_BD[:, None])
        return torch.where(is_reasoning_B1[..., None], mixed_B1D, embeds_B1D)

    def _has_mark(self) -> Tensor:
        """(B,) whether the last words contain the answer mark, which is at most as many tokens long as it has bytes."""
        last_BN = torch.stack(self.words[-len(self.mark.encode()) :], dim=1)
        texts = self.tokenizer.batch_decode(last_BN, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return torch.tensor([self.mark in text for text in texts], device=last_BN.device)

    def expected(self) -> list[Tensor]:
        """For each answer (G, D), on the CPU: what was mixed into its first G words."""
        if not self.fed:
            return [self.embeds_VD[:0].cpu()] * len(self.is_reasoning_B)
        fed_BND = torch.stack(self.fed, dim=1)
        counts_B = fed_BND.any(-1).sum(1).tolist()
        return [row[:count].cpu() for row, count in zip(fed_BND, counts_B, strict=True)]
