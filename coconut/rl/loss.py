"""Sampled answers as a batch, and the loss of the policy on it.

Shapes: N answers, B rows of a batch, T columns, V vocabulary, M sampled tokens of all rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coconut.completions.completion import Completion
from coconut.completions.scoring import CompletionBatch, SamplingDistribution
from coconut.data.tokenization import SpecialIds
from coconut.rl.objectives import Objective, Totals, clipped_objective, kl_k3

if TYPE_CHECKING:
    pass


@dataclass
class PolicyBatch(CompletionBatch):
    """A micro-batch of answers; of each sampled token (M,) what its term needs.

    `weights`, `kl_weights`: an Objective's, times the sampled tokens of the whole batch, by which an engine divides.
    `old`: log-probabilities when they were sampled, None if those are the present ones. `reference`: those of the model
    that the policy is held to, computed on this very batch; None if it is held to none.
    """

    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor
    old: Tensor | None
    reference: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.advantages)


def broadcast_to_tokens(advantages_N: Tensor, samples: Sequence[Completion]) -> list[Tensor]:
    """One number an answer as one for each of its sampled tokens."""
    return [gain.expand(len(sample.log_probs)) for gain, sample in zip(advantages_N, samples, strict=True)]


def policy_batch(
    samples: Sequence[Completion],
    advantages: Sequence[Tensor],
    objective: Objective,
    totals: Totals,
    special: SpecialIds,
    *,
    on_policy: bool,
    passes: int = 1,
) -> PolicyBatch:
    """Answers with the advantages of their sampled tokens as a micro-batch of a batch that has `totals` in all."""
    made = CompletionBatch.of(samples, special, max(passes, *(sample.passes for sample in samples)))
    lengths_N = torch.tensor([len(sample.log_probs) for sample in samples])
    weights_M, kl_weights_M = objective.weights(lengths_N, made.is_control, totals)
    return PolicyBatch(
        **vars(made),
        advantages=torch.cat(list(advantages)).float(),
        weights=weights_M * totals.tokens,
        kl_weights=kl_weights_M * totals.tokens,
        old=None if on_policy else torch.cat([sample.log_probs for sample in samples]),
    )


def totals_of(samples: Sequence[Completion], budget: int) -> Totals:
    """Of all answers of an update."""
    tokens, controls = (sum(map(len, (s.log_probs for s in samples))), sum(int(s.is_control.sum()) for s in samples))
    return Totals(len(samples), tokens, controls, budget)


@dataclass(frozen=True)
class PolicyLoss:
    """An engine's loss function: summed over the tokens of a micro-batch, which has `objective`'s weights.

    `divergences`: of each micro-batch that has a reference, the sum of its tokens' k3.
    """

    policy: SamplingDistribution
    objective: Objective
    kl_coef: float
    divergences: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, batch: PolicyBatch) -> Tensor:
        log_probs_M = self.policy.log_probs(module, batch)
        old_M = log_probs_M.detach() if batch.old is None else batch.old
        terms_M = clipped_objective(
            log_probs_M, old_M, batch.advantages, self.objective.clip_low, self.objective.clip_high
        )
        loss = (batch.weights * terms_M).sum()
        if batch.reference is None:
            return loss
        apart_M = kl_k3(log_probs_M, batch.reference)
        self.divergences.append(apart_M.detach().sum())
        return loss + self.kl_coef * (batch.kl_weights * apart_M).sum()

    def divergence(self) -> float:
        """The sum over all micro-batches since the last call."""
        found = sum(part.item() for part in self.divergences)
        self.divergences.clear()
        return found
