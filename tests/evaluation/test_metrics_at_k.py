"""pass@k, maj@k and their intervals against enumeration and simulation."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import best_at, majority_at, pass_at
from coconut.evaluation.sampling import metrics_at


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for N in (1, 3, 6, 9):
        for right in range(N + 1):
            right_N = np.arange(N) < right
            for k in range(1, N + 1):
                by_hand = np.mean([any(right_N[i] for i in chosen) for chosen in combinations(range(N), k)])
                [ours] = pass_at(right_N[None].astype(float), k)
                assert ours == pytest.approx(by_hand, abs=1e-12)
                assert ours == pytest.approx(1 - comb(N - right, k) / comb(N, k), abs=1e-12), "eq. 1"


def elected_by_hand(keys: list[str | None], gold: str, k: int) -> float:
    """Over all subsets: tied answers share the election, no readable answer is wrong."""
    shares = []
    for chosen in combinations(keys, k):
        votes = [key for key in chosen if key is not None]
        tied = [key for key in set(votes) if votes.count(key) == max(map(votes.count, votes))]
        shares.append((gold in tied) / len(tied) if tied else 0.0)
    return float(np.mean(shares))


def test_maj_at_k_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    drawn = [[None if n == 4 else "abcd"[n] for n in rng.integers(5, size=9)] for _ in range(12)]
    cases: list[list[str | None]] = [*drawn, [None] * 9, ["a"] * 9, ["a"] * 4 + ["b"] * 4 + [None]]
    right_QN = np.array([[float(key == "a") for key in keys] for keys in cases])
    sizes = range(1, 10)
    by_hand = np.array([[elected_by_hand(keys, "a", k) for k in sizes] for keys in cases])
    assert majority_at(cases, right_QN, sizes) == pytest.approx(by_hand, abs=1e-12)
    for k in sizes:
        assert majority_at(cases, right_QN, [k])[:, 0] == pytest.approx(by_hand[:, k - 1], abs=1e-12)
    assert majority_at(cases, right_QN, [9])[-3:, 0].tolist() == [0.0, 1.0, 0.5]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=8), st.data())
def test_best_at_k_is_the_mean_over_all_subsets(answers: list[tuple[int, bool]], data: st.DataObject) -> None:
    """In each subset of k the answers with the largest reward share the choice."""
    N = len(answers)
    k = data.draw(st.integers(1, N))
    shares = []
    for chosen in combinations(answers, k):
        largest = max(reward for reward, _ in chosen)
        tied = [right for reward, right in chosen if reward == largest]
        shares.append(sum(tied) / len(tied))
    rewards_QN, right_QN = (np.array([part], float) for part in zip(*answers, strict=True))
    assert best_at(rewards_QN, right_QN, k)[0] == pytest.approx(np.mean(shares), abs=1e-12)
    rows = {row.k: row for row in metrics_at([[None] * N], right_QN, rewards_QN)}
    if k in rows:
        assert rows[k].best_at_k == pytest.approx(np.mean(shares), abs=1e-12)
        assert rows[k].best_interval == mean_interval(best_at(rewards_QN, right_QN, k)[None].round(12))


def test_best_at_k_is_unbiased() -> None:
    """Of 12 draws, best@3 is on average the accuracy of the best of three new draws."""
    rng = np.random.default_rng(3)

    def draw(questions: int, answers: int) -> tuple[np.ndarray, np.ndarray]:
        right = rng.random((questions, answers)) < 0.4
        return np.round(rng.normal(size=right.shape) + right, 1), right.astype(float)

    found_Q = best_at(*draw(4000, 12), 3)
    rewards, right = draw(40_000, 3)
    tied = rewards == rewards.max(1, keepdims=True)
    truth_Q = (tied * right).sum(1) / tied.sum(1)
    error = np.hypot(found_Q.std() / len(found_Q) ** 0.5, truth_Q.std() / len(truth_Q) ** 0.5)
    assert abs(found_Q.mean() - truth_Q.mean()) < 3.5 * error


def test_one_answer_and_the_largest_number_of_answers() -> None:
    rng = np.random.default_rng(1)
    right_QN = (rng.random((5, 11)) < 0.4).astype(float)
    keys = [["a" if right else "b" for right in row] for row in right_QN]
    rows = metrics_at(keys, right_QN)
    assert [row.k for row in rows] == [1, 2, 4, 8, 11]
    assert [rows[0].pass_at_k, rows[0].maj_at_k] == pytest.approx([right_QN.mean()] * 2)
    assert rows[-1].pass_at_k == right_QN.any(1).mean()
    assert rows[-1].maj_at_k == pytest.approx((right_QN.sum(1) > 5).mean())
    many = metrics_at([["a"] * 128 + ["b"] * 126 + [None] * 2], (np.arange(256)[None] < 128).astype(float))
    assert [row.k for row in many] == [2**power for power in range(9)]
    values = np.array([(row.pass_at_k, row.maj_at_k) for row in many])
    assert np.isfinite(values).all()
    assert values[-1].tolist() == [1.0, 1.0]


def test_intervals_equal_those_of_scipy_and_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    right_QN = (rng.random((60, 8)) < rng.beta(2, 2, size=(60, 1))).astype(float)
    passed_Q = pass_at(right_QN, 2)
    theirs = bootstrap((passed_Q,), np.mean, method="percentile", n_resamples=10_000, rng=rng).confidence_interval
    assert mean_interval(passed_Q[None]) == pytest.approx(theirs, abs=0.01)
    # a question's chance of a right answer is uniform: pass@2 is the mean of 1 - (1 - p)^2, which is 2/3
    covered = 0
    for _ in range(100):
        low, high = mean_interval(pass_at((rng.random((80, 4)) < rng.random((80, 1))).astype(float), 2)[None])
        covered += low <= 2 / 3 <= high
    assert 0.9 <= covered / 100 <= 0.99


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_of_equal_values_has_a_width(value: float) -> None:
    low, high = mean_interval(np.full((1, 50), value))
    assert high - low == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-3), "Wilson's"
    assert low <= value <= high
