"""Intervals of accuracies and of their differences, and the exact test of a difference.

The bootstrap intervals (`coconut.evaluation.intervals`) cover both sources of randomness, questions and seeds. The
exact test covers the choice of questions only. It tests whether these models differ, not whether
models with new seeds would.

Shapes: S seeds, Q questions, C columns of numbers, R resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import hypot

import numpy as np
from scipy.stats import binom

from coconut.evaluation.evaluator import wilson_interval
from coconut.evaluation.intervals import mean_interval

COLUMN_RESAMPLES = 2000
Bounds = tuple[float, float, float]  # a value and the ends of its interval


def accuracy_interval(correct_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean accuracy: percentiles of 10,000 resamples of questions and seeds.

    If all answers are right, or all wrong, the bootstrap has no width, and Wilson's interval over questions is used.
    """
    return mean_interval(correct_SQ.astype(np.int64), lower_limit=0.0)


def difference_interval(a_SQ: np.ndarray, b_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the accuracy of a minus that of b, with paired resamples.

    Row s of a and b has the same seed, and column q the same question. If all differences are equal, the
    width is the upper bound of Wilson's interval for the share of questions with another difference.
    """
    assert a_SQ.shape == b_SQ.shape
    return mean_interval(a_SQ.astype(np.int64) - b_SQ, lower_limit=-1.0)


def independent_difference_interval(a_N: np.ndarray, b_M: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the accuracy of a minus that of b, on different questions.

    From the Wilson intervals of both (Newcombe 1998, Statistics in Medicine 17, method 10), so that it has a width even
    if all answers are right.
    """
    (a, a_low, a_high), (b, b_low, b_high) = (
        (float(each.mean()), *wilson_interval(int(each.sum()), len(each))) for each in (a_N, b_M)
    )
    return a - b - hypot(a - a_low, b_high - b), a - b + hypot(a_high - a, b - b_low)


def exact_test(a_SQ: np.ndarray, b_SQ: np.ndarray) -> float:
    """The two-sided p value of the exact sign-flip test over questions, for these given models.

    Under the null hypothesis a and b may be exchanged for each question. The difference of a question, summed over
    the seeds, then has either sign with equal probability. p is the probability of a sum over questions at least as
    far from 0 as the observed one. With one seed this is McNemar's exact test.
    """
    assert a_SQ.shape == b_SQ.shape
    differences_Q = (a_SQ.astype(np.int64) - b_SQ).sum(0)
    pmf = np.ones(1)  # the probability of each possible sum, from the smallest to the largest
    sizes, counts = np.unique(np.abs(differences_Q[differences_Q != 0]), return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        pmf_of_size = np.zeros(2 * size * count + 1)
        pmf_of_size[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        pmf = np.convolve(pmf, pmf_of_size)
    sums = np.arange(len(pmf)) - len(pmf) // 2
    return min(1.0, float(pmf[np.abs(sums) >= abs(int(differences_Q.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple testing (Holm 1979). Keeps their order."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.arange(len(order), 0, -1) * np.asarray(p_values, float)[order]
    return np.minimum(1, np.maximum.accumulate(corrected))[np.argsort(order)].tolist()


def share(cases: Sequence[bool]) -> Bounds:
    """The share of true cases, and its 95 % Wilson interval."""
    return sum(cases) / len(cases), *wilson_interval(sum(cases), len(cases))


def with_bounds(name: str, values: Bounds | None) -> dict[str, float | None]:
    """The entries NAME, NAME_low and NAME_high of a study's row; None for each without values."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values or (None, None, None), strict=True))


def column_means(values_QC: np.ndarray) -> list[Bounds]:
    """The mean of each column over the questions that are not NaN in it, and its 95 % interval (2,000 resamples)."""
    Q, is_there_QC = len(values_QC), (~np.isnan(values_QC)).astype(float)
    weights_RQ = np.random.default_rng(0).multinomial(Q, np.full(Q, 1 / Q), size=COLUMN_RESAMPLES)
    values_QC = np.nan_to_num(values_QC)
    counts_RC = weights_RQ @ is_there_QC
    resampled_RC = np.where(counts_RC > 0, weights_RQ @ values_QC / np.maximum(counts_RC, 1), np.nan)
    low_C, high_C = np.nanquantile(resampled_RC, (0.025, 0.975), axis=0)
    mean_C = values_QC.sum(0) / is_there_QC.sum(0)
    return list(zip(mean_C.tolist(), low_C.tolist(), high_C.tolist(), strict=True))


def partners(keys: Sequence[Hashable]) -> np.ndarray:
    """(Q,) for each question the index of another with an equal key, by a permutation; -1 if it has none."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in np.random.default_rng(0).permutation(len(keys)).tolist():
        groups[keys[index]].append(index)
    partner_Q = np.full(len(keys), -1)
    for group in groups.values():
        if len(group) > 1:
            partner_Q[group] = np.roll(group, 1)
    return partner_Q
