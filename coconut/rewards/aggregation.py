"""Selection metrics: scores of completions, weighted majority votes, and finding the first wrong step.

Shapes: Q questions, N completions of each, K different answers among the completions of one question.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from coconut.evaluation.metrics_at_k import majority_accuracy

Numbers = NDArray[np.float64]
SUBSETS = 64  # the most subsets of completions over which a weighted vote is averaged
RESAMPLES = 2000  # of the bootstrap


def aggregate_steps(rewards: Sequence[Sequence[float]], how: str) -> Numbers:
    """(completions,) one score for each completion from the rewards of its parts: their sum, min or last."""
    functions: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "min": min, "last": lambda parts: parts[-1]}
    return np.array([functions[how](parts) for parts in rewards])


def weighted_vote(
    answers: Sequence[Sequence[Hashable | None]], weights_QN: Numbers, right_QN: Numbers, size: int, seed: int = 0
) -> Numbers:
    """(Q,) expected accuracy of the weighted vote of `size` completions, drawn without replacement from the N.

    answers: the key by which the task compares each completion's answer (`Task.key`). None, no answer, has no vote; if
        all are None the vote is wrong.
    The answer with the largest sum of weights wins; tied answers are equally likely. If all weights of a draw are zero,
    each completion has one vote. Exact, over all draws, where weights are equal or there are at most SUBSETS draws;
    else the mean over SUBSETS random draws.
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
            accuracy_Q[q] = majority_accuracy(counts_K.tolist(), right_K.tolist(), N, [size])[0]
    return accuracy_Q


def _vote_accuracy(key_id_N: NDArray[np.int64], weights_N: Numbers, right_K: Numbers, drawn: Sequence[int]) -> float:
    """Expected accuracy of the weighted vote of the drawn completions of one question."""
    voting = [index for index in drawn if key_id_N[index] >= 0]
    if not voting:
        return 0.0
    weights = weights_N[voting] if weights_N[voting].any() else np.ones(len(voting))
    sums_K = np.bincount(key_id_N[voting], weights, minlength=len(right_K))
    return float(right_K[np.isclose(sums_K, sums_K.max(), rtol=1e-9, atol=0)].mean())


def bootstrap_interval(values_Q: Numbers, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean, by resampling questions."""
    Q = len(values_Q)
    means = values_Q[np.random.default_rng(seed).integers(Q, size=(RESAMPLES, Q))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def first_errors(predicted: Sequence[int | None], true: Sequence[int | None]) -> dict[str, float]:
    """Compare the predicted with the true index of each completion's first wrong step; None: no step is wrong.

    of_wrong: among completions with a wrong step, the share whose first is found exactly. of_right: among the others,
        the share for which none is found.
    f1: the harmonic mean of the two (ProcessBench; Zheng et al., arXiv 2412.06559, section 3).
    """
    pairs = list(zip(predicted, true, strict=True))
    hits = [[a == b for a, b in pairs if (b is None) == without] for without in (False, True)]
    of_wrong, of_right = (float(np.mean(part)) if part else 0.0 for part in hits)
    f1 = 2 * of_wrong * of_right / (of_wrong + of_right) if of_wrong + of_right else 0.0
    return {"f1": f1, "of_wrong": of_wrong, "of_right": of_right}


def first_below(rewards: Sequence[Sequence[float]], threshold: float) -> list[int | None]:
    """The index of the first step of each completion with a reward below the threshold; None if there is none."""
    return [next((n for n, value in enumerate(row) if value < threshold), None) for row in rewards]


def best_threshold(rewards: Sequence[Sequence[float]], true: Sequence[int | None], tries: int = 99) -> float:
    """The threshold with the largest F1 on these completions. Report F1 on other ones."""
    values = np.array([value for row in rewards for value in row])
    candidates = np.quantile(values, np.linspace(0.005, 0.995, tries))
    return float(max(candidates, key=lambda threshold: first_errors(first_below(rewards, threshold), true)["f1"]))
