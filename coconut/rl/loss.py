"""The policy's micro-batches and its loss.

Shapes: N completions, M sampled tokens of all rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coconut.completions.completion import Completion
from coconut.completions.scoring import CompletionBatch, SamplingDistribution
from coconut.data.tokenization import SpecialIds
from coconut.rl.objectives import Objective, Totals, kl_k3
from coconut.rl.ratio_statistics import RatioStatistics


@dataclass
class PolicyBatch(CompletionBatch):
    """A micro-batch of completions with the terms of each sampled token, (M,) each.

    weights, kl_weights: of the Objective, times the sampled tokens of the whole batch, by which the engine divides.
    old: log-probabilities at sampling; None in an on-policy update, where they equal the current ones.
    reference: log-probabilities under the reference model, computed on this same micro-batch; None without a KL term.
    """

    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor
    old: Tensor | None
    reference: Tensor | None = None

    @property
    def denominators(self) -> tuple[int]:
        return (len(self.advantages),)


def broadcast_to_tokens(advantages_N: Tensor, completions: Sequence[Completion]) -> list[Tensor]:
    """Expand (N,) advantages to one tensor (M,) a completion, with one value for each of its sampled tokens."""
    return [value.expand(len(s.log_probs)) for value, s in zip(advantages_N, completions, strict=True)]


def policy_batch(
    completions: Sequence[Completion], advantages: Sequence[Tensor], objective: Objective, totals: Totals,
    special: SpecialIds, *, on_policy: bool, passes: int = 1,
) -> PolicyBatch:  # fmt: skip
    """Collate completions, with the advantages of their sampled tokens, into a micro-batch.

    `totals` are those of the whole batch.
    """
    batch = CompletionBatch.of(completions, special, max(passes, *(completion.passes for completion in completions)))
    lengths_N = torch.tensor([len(completion.log_probs) for completion in completions])
    weights_M, kl_weights_M = objective.weights(lengths_N, batch.is_control, totals)
    return PolicyBatch(
        **vars(batch),
        advantages=torch.cat(list(advantages)).float(),
        weights=weights_M * totals.tokens,
        kl_weights=kl_weights_M * totals.tokens,
        old=None if on_policy else torch.cat([completion.log_probs for completion in completions]),
    )


def totals_of(completions: Sequence[Completion], budget: int) -> Totals:
    """The totals of all completions of an update. `budget`: see Totals."""
    controls = sum(int(s.is_control.sum()) for s in completions)
    return Totals(len(completions), sum(len(s.log_probs) for s in completions), controls, budget)


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's loss function, for an engine: the weighted sum over the tokens of a micro-batch.

    `divergences`: for each micro-batch with a reference, the sum of its tokens' k3 estimates of the KL divergence.
    `ratios`: of completions with noisy thoughts in updates that are not on-policy.
    """

    distribution: SamplingDistribution
    objective: Objective
    kl_coef: float
    divergences: list[Tensor] = field(default_factory=list)
    ratios: RatioStatistics = field(default_factory=RatioStatistics)

    def __call__(self, module: nn.Module, batch: PolicyBatch) -> Tensor:
        log_probs_M = self.distribution.log_probs(module, batch)
        old_M = log_probs_M.detach() if batch.old is None else batch.old
        loss = (batch.weights * self.objective.clipped(log_probs_M, old_M, batch.advantages)).sum()
        if batch.thoughts is not None and batch.old is not None:
            log_ratios_M = log_probs_M.detach() - old_M
            is_clipped_M = self.objective.is_clipped(log_ratios_M, batch.advantages)
            self.ratios.add(log_ratios_M, is_clipped_M, batch.is_thought)
        if batch.reference is None:
            return loss
        apart_M = kl_k3(log_probs_M, batch.reference)
        self.divergences.append(apart_M.detach().sum())
        return loss + self.kl_coef * (batch.kl_weights * apart_M).sum()

    def divergence(self) -> float:
        """The sum of k3 over all micro-batches since the last call."""
        total = sum(part.item() for part in self.divergences)
        self.divergences.clear()
        return total
