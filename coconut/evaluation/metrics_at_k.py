"""Metrics at k: what k of the n sampled answers to a question are worth, in expectation over all draws of k of the n.

Shapes: Q questions, N answers to each, K different answers among those to one question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

Numbers = NDArray[np.float64]


def pass_at(right_QN: Numbers, size: int) -> Numbers:
    """(Q,) pass@size: the probability that one or more of `size` answers is right (arXiv 2107.03374, eq. 1)."""
    return hypergeom.sf(0, right_QN.shape[1], (right_QN > 0).sum(1), size)


def best_at(scores_QN: Numbers, right_QN: Numbers, size: int) -> Numbers:
    """(Q,) best@size: the probability that the answer with the largest score of `size` is right. Exact, over all draws.

    Answers with the same score are equally likely to be chosen.
    """
    N = scores_QN.shape[1]
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    sorted_QN = np.take_along_axis(scores_QN, order_QN, 1)
    right_QN = _average_ties(np.take_along_axis(right_QN, order_QN, 1), sorted_QN)
    all_among_worst = hypergeom.pmf(size, N, np.arange(N, -1, -1), size)  # the N, N - 1, ... 0 with the worst scores
    return right_QN @ -np.diff(all_among_worst)


def _average_ties(right_QN: Numbers, sorted_QN: Numbers) -> Numbers:
    """Replace correctness within each run of tied scores by its mean; rows are sorted by score."""
    averaged = right_QN.astype(np.float64).copy()
    for q, row in enumerate(sorted_QN):
        _, inverse, counts = np.unique(-row, return_inverse=True, return_counts=True)
        if len(counts) < len(row):
            averaged[q] = (np.bincount(inverse, right_QN[q]) / counts)[inverse]
    return averaged


def majority_at(keys: Sequence[Sequence[Hashable | None]], right_QN: Numbers, sizes: Sequence[int]) -> Numbers:
    """(Q, sizes) maj@k: the probability that the majority vote of k answers is right. Exact, over all draws.

    keys: what the task compares of each answer (`Task.key`); answers with equal keys vote for the same. None, an answer
        that cannot be read, has no vote; if none of the drawn answers has one, the vote is wrong.
    Tied answers are equally likely to be elected.
    """
    accuracies = []
    for row, right_N in zip(keys, right_QN.tolist(), strict=True):
        votes: defaultdict[Hashable, list[float]] = defaultdict(list)
        for key, right in zip(row, right_N, strict=True):
            if key is not None:
                votes[key].append(right)
        counts, shares = [len(of) for of in votes.values()], [sum(of) / len(of) for of in votes.values()]
        accuracies.append(majority_accuracy(counts, shares, len(row), sizes))
    return np.array(accuracies)


def majority_accuracy(counts: Sequence[int], right: Sequence[float], samples: int, sizes: Sequence[int]) -> Numbers:
    """(sizes,) accuracy of the majority vote of so many of the `samples` answers to a question, over all draws.

    counts (K,): how often each answer was given; the other samples have no vote. right (K,): the share of them that is
        right.
    For each answer that can be right and each number of its votes, dynamic programming over the other answers counts
    the draws in which none has more votes, by the number of answers with equally many and of other samples drawn.
    """
    accuracies, largest = np.zeros(len(sizes)), max(sizes)
    for winner, right_share in enumerate(right):
        others = [count for other, count in enumerate(counts) if other != winner]
        for votes in range(1, min(counts[winner], largest) + 1) if right_share else ():
            columns = largest - votes + 1
            draws = np.array([[float(comb(samples - sum(counts), n)) for n in range(columns)]])  # (ties, other samples)
            for count in others:
                fewer = [float(comb(count, n)) for n in range(min(count + 1, votes, columns))]
                more = np.stack([np.convolve(row, fewer)[:columns] for row in draws])
                if votes <= count and votes < columns:
                    more = np.concatenate([more, np.zeros((1, columns))])
                    more[1:, votes:] += comb(count, votes) * draws[:, : columns - votes]
                draws = more[: (columns - 1) // votes + 1]
            elected = (draws / np.arange(1, len(draws) + 1)[:, None]).sum(0) * comb(counts[winner], votes) * right_share
            for place, size in enumerate(sizes):
                if votes <= size:
                    accuracies[place] += elected[size - votes] / comb(samples, size)
    return accuracies
