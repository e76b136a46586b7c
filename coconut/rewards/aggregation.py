"""What scores are good for: choosing among sampled answers, votes, and finding the first wrong step.

Shapes: Q questions, N answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Numbers = NDArray[np.float64]
SUBSETS = 64  # draws of weighted votes; a sample, where there are more
RESAMPLES = 2000


def aggregate_steps(rewards: Sequence[Sequence[float]], how: str) -> Numbers:
    """(answers,) one score for each answer from the rewards of its parts: their sum, the least, or the last one."""
    functions: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "min": min, "last": lambda parts: parts[-1]}
    return np.array([functions[how](parts) for parts in rewards])


def best_of(scores_QN: Numbers, right_QN: Numbers, size: int) -> Numbers:
    """(Q,) how likely the best by its score of `size` answers, drawn from the N without putting back, is right.

    Exactly, over all draws; among equal scores each answer is as likely.
    """
    N = scores_QN.shape[1]
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    sorted_QN = np.take_along_axis(scores_QN, order_QN, 1)
    right_QN = _average_ties(np.take_along_axis(right_QN, order_QN, 1), sorted_QN)
    num_worse_N = np.arange(N - 1, -1, -1)  # answers that are worse
    win_probability_N = np.exp(_log_choose(num_worse_N, size - 1) - _log_choose(np.array(N), size))
    return right_QN @ win_probability_N


def pass_at(right_QN: Numbers, size: int) -> Numbers:
    """(Q,) how likely one at least of `size` answers is right: pass@size (Chen et al., arXiv 2107.03374, eq. 1)."""
    N, wrong_Q = right_QN.shape[1], (right_QN == 0).sum(1)
    return 1 - np.exp(_log_choose(wrong_Q, size) - _log_choose(np.array(N), size))


def weighted_vote(
    answers: Sequence[Sequence[Hashable | None]], weights_QN: Numbers, right_QN: Numbers, size: int, seed: int = 0
) -> Numbers:
    """(Q,) how likely the answer with the largest sum of weights among `size` samples, drawn from the N without putting
    back, is right; among equal sums each answer is as likely.

    `answers`: what the task compares of each sample (`Task.key`); a sample without an answer, None, has no vote, and
    where none has one that is wrong. Exactly, over all draws, where the samples weigh alike or there are at most
    SUBSETS draws; else the mean over SUBSETS random ones. Samples that all weigh nothing are counted.
    """
    rng, accuracy_Q, N = np.random.default_rng(seed), np.zeros(len(answers)), right_QN.shape[1]
    enumerable = comb(N, size) <= SUBSETS
    for q, keys in enumerate(answers):
        key_ids = {key: n for n, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
        if not key_ids:
            continue
        key_id_N = np.array([-1 if key is None else key_ids[key] for key in keys])
        has_key = key_id_N >= 0
        counts_K = np.bincount(key_id_N[has_key])
        right_K = np.bincount(key_id_N[has_key], right_QN[q][has_key]) / counts_K
        if enumerable or np.ptp(weights_QN[q][has_key]):
            draws: Iterable[Sequence[int]] = combinations(range(N), size)
            if not enumerable:
                draws = (rng.permutation(N)[:size].tolist() for _ in range(SUBSETS))
            accuracy_Q[q] = np.mean([_vote_accuracy(key_id_N, weights_QN[q], right_K, drawn) for drawn in draws])
        else:
            accuracy_Q[q] = _majority_accuracy(counts_K.tolist(), right_K.tolist(), N, size)
    return accuracy_Q


def _vote_accuracy(key_id_N: NDArray[np.int64], weights_N: Numbers, right_K: Numbers, drawn: Sequence[int]) -> float:
    """How likely the answer that these samples elect is right."""
    voting = [sample for sample in drawn if key_id_N[sample] >= 0]
    if not voting:
        return 0.0
    weights = weights_N[voting] if weights_N[voting].any() else np.ones(len(voting))
    sums_K = np.bincount(key_id_N[voting], weights, minlength=len(right_K))
    return float(right_K[np.isclose(sums_K, sums_K.max(), rtol=1e-9, atol=0)].mean())


def _majority_accuracy(counts: Sequence[int], right: Sequence[float], samples: int, size: int) -> float:
    """How likely the most frequent answer among `size` of the samples is right, over all draws.

    For each answer that can be right, and each number of its votes: the draws in which no other answer has more, by how
    many have as many.
    """
    accuracy = 0.0
    for winner, right_share in enumerate(right):
        others = [count for other, count in enumerate(counts) if other != winner]
        for votes in range(1, min(counts[winner], size) + 1) if right_share else ():
            combinations_by_ties = np.zeros(
                ((size - votes) // votes + 1, size - votes + 1)
            )  # by answers that tie, and samples drawn
            no_answer = samples - sum(counts)
            combinations_by_ties[0] = [comb(no_answer, drawn) for drawn in range(size - votes + 1)]
            for count in others:
                more = np.zeros_like(combinations_by_ties)
                for n in range(min(count, votes, size - votes) + 1):
                    drawn = comb(count, n) * combinations_by_ties[:, : combinations_by_ties.shape[1] - n]
                    if n < votes:
                        more[:, n:] += drawn
                    else:
                        more[1:, n:] += drawn[:-1]
                combinations_by_ties = more
            elected = (combinations_by_ties[:, -1] / np.arange(1, len(combinations_by_ties) + 1)).sum()
            accuracy += right_share * comb(counts[winner], votes) * float(elected) / comb(samples, size)
    return accuracy


def bootstrap_interval(values_Q: Numbers, seed: int = 0) -> tuple[float, float]:
    """95 %, of the mean, questions drawn anew."""
    Q = len(values_Q)
    means = values_Q[np.random.default_rng(seed).integers(Q, size=(RESAMPLES, Q))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class FirstError:
    """How well the first wrong step is found: among answers with one, exactly it; among the others, that there is none.

    `f1`: the harmonic mean of the two shares (ProcessBench; Zheng et al., arXiv 2412.06559, section 3).
    """

    wrong: float
    right: float

    @property
    def f1(self) -> float:
        total = self.wrong + self.right
        return 2 * self.wrong * self.right / total if total else 0.0


def first_errors(found: Sequence[int | None], true: Sequence[int | None]) -> FirstError:
    pairs = list(zip(found, true, strict=True))
    wrong = [predicted == expected for predicted, expected in pairs if expected is not None]
    right = [predicted is None for predicted, expected in pairs if expected is None]
    return FirstError(float(np.mean(wrong)) if wrong else 0.0, float(np.mean(right)) if right else 0.0)


def first_below(rewards: Sequence[Sequence[float]], threshold: float) -> list[int | None]:
    """The first step of each answer that is rewarded less than this, None if there is none."""
    return [next((n for n, value in enumerate(row) if value < threshold), None) for row in rewards]


def best_threshold(rewards: Sequence[Sequence[float]], true: Sequence[int | None], tries: int = 99) -> float:
    """The one with the largest F1 on these answers, which are not those that it is then judged by."""
    values = np.array([value for row in rewards for value in row])
    candidates = np.quantile(values, np.linspace(0.005, 0.995, tries))
    return float(max(candidates, key=lambda threshold: first_errors(first_below(rewards, threshold), true).f1))


def _log_choose(n: NDArray[np.int64], k: int) -> Numbers:
    """log C(n, k); minus infinity where k > n."""
    with np.errstate(invalid="ignore"):
        value = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(np.maximum(n - k, 0) + 1.0)
    return np.where(n >= k, value, -np.inf)


def _average_ties(right_QN: Numbers, sorted_QN: Numbers) -> Numbers:
    """Among equal scores, which stand together, the share that is right in place of each."""
    averaged = right_QN.astype(np.float64).copy()
    for q, row in enumerate(sorted_QN):
        _, inverse, counts = np.unique(-row, return_inverse=True, return_counts=True)
        if len(counts) < len(row):
            averaged[q] = (np.bincount(inverse, right_QN[q]) / counts)[inverse]
    return averaged
