"""Value model, the baseline with a head: after every token, the probability that the completion comes out right.

A token-level verifier (Cobbe et al., arXiv 2110.14168, section 4 and appendix E), trained on whole completions, whose
label is the target at each of their tokens. As there, the head is the logit of a token that is never generated.

Shapes: M tokens of all completions, P parts of one of them.
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
    """(M,) the value before each token of the completions, as logits, float32. `token`: whose logit is the head."""
    return forward_at_targets(module, batch).target_logits[:, token].float()


@dataclass(frozen=True)
class ValueModel:
    """The values that a trained value model gives to prefixes of completions."""

    lm: LatentLM

    @torch.no_grad()
    def before(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(M,) for each completion, as logits: the value of the prefix before each of its tokens."""
        return score_tokens(
            self.lm, completions, batch_size, lambda batch: token_values(self.lm, batch, self.lm.special.latent)
        )

    def steps(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(P,) for each completion: the probability that it comes out right, after each step and after the answer."""
        values = []
        for row, completion in zip(self.before(completions, batch_size), completions, strict=True):
            parts = torch.tensor(completion_parts(self.lm, completion.completion_ids))
            ends = [*torch.nonzero(parts.diff()).flatten().add(1).tolist(), len(parts) - 1]
            values.append(row[ends].sigmoid())
        return values
