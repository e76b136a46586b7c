"""The baseline with a head: after every token, how likely the answer is to come out right.

A verifier of tokens (Cobbe et al., arXiv 2110.14168, section 4 and appendix E): trained on whole answers, whose label
is the target at each of their tokens. As there the head is the logit of a token that is never said.

Shapes: N answers, M tokens of them, P parts of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coconut.completions.completion import Completion
from coconut.completions.scoring import CompletionBatch, forward_at_targets, score_tokens
from coconut.rewards.step_spans import completion_parts

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def token_values(module: nn.Module, batch: CompletionBatch, token: int) -> Tensor:
    """(M,) before each token of the answers, in logits, float32."""
    return forward_at_targets(module, batch).target_logits[:, token].float()


@dataclass(frozen=True)
class ValueModel:
    """What such a model says of answers."""

    lm: LatentLM

    @torch.no_grad()
    def before(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """For each answer (its tokens,), in logits: the value of what stands before each of them."""
        return score_tokens(
            self.lm, completions, batch_size, lambda batch: token_values(self.lm, batch, self.lm.special.latent)
        )

    def parts(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(P,) for each answer: how likely it is to come out right after each of its steps, and after the answer."""
        values = []
        for row, completion in zip(self.before(completions, batch_size), completions, strict=True):
            parts = torch.tensor(completion_parts(self.lm, completion.completion_ids))
            ends = [*torch.nonzero(parts.diff()).flatten().add(1).tolist(), len(parts) - 1]
            values.append(row[ends].sigmoid())
        return values
