"""Bootstrap intervals of means over questions, and over questions and seeds.

Questions and seeds are resampled with replacement, and the same questions are drawn for all seeds. With three seeds or
fewer the resampling of seeds is coarse, and with one seed it has no effect.

Shapes: S seeds, Q questions, R resamples, C kinds of questions.
"""

from __future__ import annotations

import numpy as np

from coconut.evaluation.evaluator import wilson_interval

RESAMPLES = 10_000


def mean_interval(values_SQ: np.ndarray, lower_limit: float = 0.0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean: percentiles of 10,000 resamples, always the same ones.

    If all values are equal, the bootstrap has no width. The width is then the upper bound of Wilson's interval for the
    share of questions with another value, and the interval is kept within lower_limit .. 1.
    """
    S, Q = values_SQ.shape
    value = values_SQ[0, 0]
    if np.allclose(values_SQ, value, rtol=0, atol=1e-12):
        wilson_width = wilson_interval(0, Q)[1]
        return max(float(value) - wilson_width, lower_limit), min(float(value) + wilson_width, 1.0)
    random = np.random.default_rng(0)
    kinds_SC, counts_C = np.unique(values_SQ, axis=1, return_counts=True)  # equal columns are drawn as one kind
    questions_RC = random.multinomial(Q, counts_C / Q, size=RESAMPLES)
    seeds_RS = random.multinomial(S, np.full(S, 1 / S), size=RESAMPLES)
    sums_R = (seeds_RS * (questions_RC @ kinds_SC.T)).sum(1)
    low, high = np.quantile(sums_R, (0.025, 0.975)) / (S * Q)
    return float(low), float(high)


def ratio_interval(numerators_Q: np.ndarray, denominators_Q: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval over questions of a ratio of two means, from 10,000 resamples, always the same ones.

    The denominators are positive.
    """
    Q = len(numerators_Q)
    counts_RQ = np.random.default_rng(0).multinomial(Q, np.full(Q, 1 / Q), size=RESAMPLES)
    low, high = np.quantile((counts_RQ @ numerators_Q) / (counts_RQ @ denominators_Q), (0.025, 0.975))
    return float(low), float(high)
