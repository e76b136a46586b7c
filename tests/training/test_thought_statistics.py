"""Thoughts that say something, and thoughts that have collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import pdist

from coconut.training.thought_statistics import measure_thoughts


def drawn(N: int = 20, K: int = 3, D: int = 8) -> torch.Tensor:
    return torch.randn(N, K, D, generator=torch.Generator().manual_seed(0))


TABLE = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))


def test_distances_are_those_of_scipy() -> None:
    thoughts = drawn()
    found = measure_thoughts(thoughts, TABLE)
    assert found.norm == pytest.approx(thoughts.norm(dim=-1).mean().item(), rel=1e-5)
    assert found.within == pytest.approx(sum(pdist(chain).mean() for chain in thoughts.numpy()) / 20, rel=1e-4)
    assert found.across == pytest.approx(sum(pdist(thoughts[:, k].numpy()).mean() for k in range(3)) / 3, rel=1e-4)
    nearest = [(TABLE - thought).norm(dim=1).min() for thought in thoughts.flatten(0, 1)]
    assert found.to_table == pytest.approx(torch.stack(nearest).mean().item(), rel=1e-4)
    assert found.collapse() == []


def flat(thoughts: torch.Tensor, counts: list[int]) -> dict[str, float]:
    """The same, pair by pair."""
    there = [(n, k) for n, count in enumerate(counts) for k in range(count)]
    exact = thoughts.double()
    within = [(exact[n, k] - exact[n, j]).norm() for n, k in there for j in range(k)]
    across = [(exact[n, k] - exact[m, j]).norm() for n, k in there for m, j in there if k == j and m < n]
    means = {k: torch.stack([exact[n, k] for n, j in there if j == k]).mean(0) for _, k in there}
    singular = torch.linalg.svdvals(torch.stack([exact[n, k] - means[k] for n, k in there]))
    shares = singular / singular.sum()
    return {
        "norm": torch.stack([exact[n, k].norm() for n, k in there]).mean().item(),
        "within": torch.stack(within).mean().item(),
        "across": torch.stack(across).mean().item(),
        "to_table": torch.stack([(TABLE.double() - exact[n, k]).norm(dim=1).min() for n, k in there]).mean().item(),
        "rank": math.exp(-(shares * shares.clamp(min=1e-300).log()).sum()),
    }


def test_zeros_after_a_questions_last_thought_count_for_nothing() -> None:
    counts = [3, 0, 2, 1, 0, 3, 3, 2] + 12 * [0]
    thoughts = drawn() * (torch.arange(3) < torch.tensor(counts)[:, None])[..., None]
    found = measure_thoughts(thoughts, TABLE, torch.tensor(counts)).as_dict()
    assert found == pytest.approx(flat(thoughts, counts), rel=1e-5)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_thoughts_that_are_nearly_equal_and_large(spread: float) -> None:
    centre = 100 * torch.ones(8, dtype=torch.float64)
    thoughts = centre + spread * drawn().double()
    assert measure_thoughts(thoughts, TABLE).as_dict() == pytest.approx(flat(thoughts, [3] * 20), rel=1e-5)


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_the_effective_rank_counts_directions_of_equal_weight(directions: int) -> None:
    axes = torch.eye(8)[:directions]
    thoughts = torch.cat([axes, -axes]).reshape(-1, 1, 8)
    assert measure_thoughts(thoughts, TABLE).rank == pytest.approx(directions, rel=1e-4)


@pytest.mark.parametrize(
    ("thoughts", "said"),
    [
        (drawn()[:, :1].expand(-1, 3, -1), "from the first of a chain to its last"),
        (drawn()[:1].expand(20, -1, -1), "whatever the question"),
        (drawn()[..., :1] * torch.ones(8) + 1e-4 * drawn(), "one direction only"),
        (torch.zeros(20, 3, 8), "zero or not finite"),
        (torch.full((20, 3, 8), math.nan), "zero or not finite"),
    ],
)
def test_each_collapse_is_named(thoughts: torch.Tensor, said: str) -> None:
    (problem,) = measure_thoughts(thoughts, TABLE).collapse()
    assert said in problem


def test_one_thought_and_one_question_have_no_distances() -> None:
    found = measure_thoughts(drawn(1, 1), TABLE)
    assert (found.within, found.across) == (None, None)
    assert found.collapse() == []
    assert "within" not in found.describe()
