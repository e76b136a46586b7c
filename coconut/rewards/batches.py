"""Batches of labelled completions, the loss functions of reward models, and their validation metrics.

Shapes: N completions, M sampled tokens of all of them, P pairs of a right and a wrong completion of one question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coconut.completions.completion import Completion
from coconut.completions.scoring import CompletionBatch, SamplingDistribution
from coconut.data.tokenization import SpecialIds
from coconut.engine.world import World
from coconut.rewards.labelled_answers import LabelledAnswers, all_completions
from coconut.rewards.losses import Loss
from coconut.rewards.value_model import token_values

T = TypeVar("T")


@dataclass
class RewardBatch(CompletionBatch):
    """A micro-batch of labelled completions. For a pairwise loss, right and wrong ones alternate.

    counts: (N,) sampled tokens of each completion.
    reference: (N,) log-probabilities of the whole completions under the reference model.
    right: (N,) whether the answer is right.
    reference_point: scalar, see `losses.kto`.
    num_items: the completions, or pairs, over which the loss is summed; the engine divides by their total.
    """

    counts: Tensor
    reference: Tensor
    right: Tensor
    reference_point: Tensor
    num_items: int

    @property
    def denominators(self) -> tuple[int]:
        return (self.num_items,)

    @property
    def owner(self) -> Tensor:
        """(M,) the index of the completion that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts)


def reward_batch(
    completions: Sequence[Completion], reference_N: Tensor, right_N: Tensor, special: SpecialIds, passes: int, *,
    reference_point: Tensor | None = None, num_items: int | None = None,
) -> RewardBatch:  # fmt: skip
    """Collate a micro-batch. `num_items`: by default the number of completions; pairs must be given."""
    return RewardBatch(
        **vars(CompletionBatch.of(completions, special, passes)),
        counts=torch.tensor([len(completion.log_probs) for completion in completions]),
        reference=reference_N, right=right_N,
        reference_point=torch.zeros(()) if reference_point is None else reference_point,
        num_items=len(reference_N) if num_items is None else num_items,
    )  # fmt: skip


def reward_loss(loss: Loss, sampling: SamplingDistribution, beta: float, weight: float = 1.0) -> Any:
    """The loss function of an implicit reward model, for an engine: summed over the items of a micro-batch.

    `weight`: the number of wrong completions for each right one, for losses that balance them.
    """

    def loss_sum(module: nn.Module, batch: RewardBatch) -> Tensor:
        log_probs_M = sampling.log_probs(module, batch)
        if not batch.num_items:
            return 0.0 * log_probs_M.sum()
        sums_N = log_probs_M.new_zeros(len(batch.counts)).index_add(0, batch.owner, log_probs_M)
        rewards_N = beta * (sums_N - batch.reference)
        if loss.pairs:
            return loss.of(rewards_N[0::2], rewards_N[1::2]).sum()
        reference = (batch.reference_point, weight) if loss.uses_reference_point else ()
        return loss.of(rewards_N, batch.right, *reference).sum()

    return loss_sum


def value_loss(loss: Loss, token: int) -> Any:
    """The loss function of a value model, for an engine: of each completion the mean over its tokens."""

    def loss_sum(module: nn.Module, batch: RewardBatch) -> Tensor:
        values_M = token_values(module, batch, token)
        if not batch.num_items:
            return 0.0 * values_M.sum()
        return (loss.of(values_M, batch.right[batch.owner]) / batch.counts[batch.owner]).sum()

    return loss_sum


@dataclass(frozen=True)
class AnswerSet:
    """Completions of several questions. `right` (N,): whether they are right. `question` (N,): the question's index."""

    completions: list[Completion]
    right: np.ndarray
    question: np.ndarray

    @classmethod
    def of(cls, labelled: Sequence[LabelledAnswers]) -> AnswerSet:
        right = np.array([right for row in labelled for right in row.correct])
        question = np.repeat(np.arange(len(labelled)), [len(row.completions) for row in labelled])
        return cls(all_completions(labelled), right, question)

    def pairs(self, seed: int) -> np.ndarray:
        """(P, 2) indices of a right and a wrong completion of the same question, each completion at most once."""
        rng, pairs = np.random.default_rng(seed), []
        for question in range(int(self.question.max()) + 1):
            own = np.flatnonzero(self.question == question)
            right, wrong = (rng.permutation(own[self.right[own] == label]) for label in (True, False))
            pairs += list(zip(right, wrong, strict=False))
        return np.array(pairs, int).reshape(-1, 2)

    def preference_metrics(self, rewards_N: np.ndarray) -> dict[str, float]:
        """How well rewards separate right from wrong completions of the same question.

        pairs: the share of all (right, wrong) pairs in which the right one has the larger reward; ties count half.
        best_of_n: the accuracy of the completion with the largest reward. mean: the accuracy of all completions.
        """
        num_ordered, num_pairs, best_is_right = 0.0, 0, []
        for question in range(int(self.question.max()) + 1):
            own = self.question == question
            margins = rewards_N[own & self.right][:, None] - rewards_N[own & ~self.right]
            num_ordered += float((margins > 0).sum() + 0.5 * (margins == 0).sum())
            num_pairs += margins.size
            best_is_right.append(bool(self.right[own][rewards_N[own].argmax()]))
        best_of_n = float(np.mean(best_is_right))
        return {"pairs": num_ordered / max(num_pairs, 1), "best_of_n": best_of_n, "mean": float(self.right.mean())}


def score_across_processes(
    score: Callable[[Sequence[Completion]], Sequence[T]], completions: Sequence[Completion], world: World
) -> list[T]:
    """Score completions on all ranks, each with its shard, and gather the results on every rank, in order."""
    scores: dict[int, T] = {}
    for rank, shard in enumerate(world.all_gather_object(score(completions[world.rank :: world.size]))):
        scores |= zip(range(rank, len(completions), world.size), shard, strict=True)
    return [scores[index] for index in range(len(completions))]
