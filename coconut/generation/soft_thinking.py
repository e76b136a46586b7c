"""Soft Thinking: mixtures of words in place of a chain that is written, without training.

Zhang et al., arXiv 2505.15778. The question is read as for a written chain. Then mixtures of words' input embeddings
under the next-token distribution are fed one after the other, until the model is about to answer. The answer's mark is
given as text, and the answer is decoded in words.

Shapes: B questions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coconut.data.tokenization import answer_mark_ids
from coconut.generation.config import SoftThinking
from coconut.models.feedback import mixture
from coconut.models.losses import at_least_float32

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


class SoftThoughts:
    """The thoughts of one batch of questions, and when they end. `mark`: the token ids of the answer's mark.

    Raises ValueError for a model that has thoughts, modes or gates of its own, or a prompt format without an answer's
    mark.
    """

    def __init__(self, lm: LatentLM, settings: SoftThinking):
        reasoning = lm.reasoning
        if reasoning.modes or reasoning.slot.thinks:
            own = f"the modes {', '.join(reasoning.modes)}" if reasoning.modes else "latent thoughts of its own"
            raise ValueError(
                f"soft_thinking is for a model that writes its chain, and {reasoning.method} has {own}. Leave it out, "
                "or take a model such as that of method=cot."
            )
        if lm.gates:
            raise ValueError("soft_thinking writes no words, and this model's gates mix into those that it writes.")
        self.mark = answer_mark_ids(lm.tokenizer, reasoning.format)
        if not self.mark:
            raise ValueError(
                f"soft_thinking ends where the answer begins, but the prompt format of the answer is "
                f"{reasoning.format.answer!r}, without a mark before {{}} that is a token of its own."
            )
        self.lm, self.settings = lm, settings
        self._ends = torch.tensor([self.mark[0], lm.special.eos], device=lm.device)
        self._low_B: Tensor | None = None

    def __call__(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The next thoughts (B, D) after these last hidden states, and which rows have ended before them (B,)."""
        lm, settings = self.lm, self.settings
        logits_BV = at_least_float32(lm.logits(states_BD))
        words_BV = logits_BV.index_fill(-1, torch.tensor(lm.special.added, device=lm.device), -torch.inf)
        ends_B = torch.isin(words_BV.argmax(-1), self._ends)
        if settings.entropy:
            is_low_B = torch.distributions.Categorical(logits=words_BV).entropy() < settings.entropy
            before_B = torch.zeros_like(is_low_B, dtype=torch.long) if self._low_B is None else self._low_B
            self._low_B = torch.where(is_low_B, before_B + 1, 0)
            ends_B = ends_B | (self._low_B >= settings.patience)
        table = lm.base.get_input_embeddings()
        return mixture(logits_BV, table, lm.special.added, settings.top_k, settings.temperature), ends_B
