"""Thoughts that say something, and thoughts that have collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import pdist

from coconut.collapse import look_at


def drawn(N: int = 20, K: int = 3, D: int = 8) -> torch.Tensor:
    return torch.randn(N, K, D, generator=torch.Generator().manual_seed(0))


TABLE = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))


def test_distances_are_those_of_scipy() -> None:
    thoughts = drawn()
    found = look_at(thoughts, TABLE)
    assert found.norm == pytest.approx(thoughts.norm(dim=-1).mean().item(), rel=1e-5)
    assert found.within == pytest.approx(sum(pdist(chain).mean() for chain in thoughts.numpy()) / 20, rel=1e-4)
    assert found.across == pytest.approx(sum(pdist(thoughts[:, k].numpy()).mean() for k in range(3)) / 3, rel=1e-4)
    nearest = [(TABLE - thought).norm(dim=1).min() for thought in thoughts.flatten(0, 1)]
    assert found.to_table == pytest.approx(torch.stack(nearest).mean().item(), rel=1e-4)
    assert found.collapse() == []


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_the_effective_rank_counts_directions_of_equal_weight(directions: int) -> None:
    axes = torch.eye(8)[:directions]
    thoughts = torch.cat([axes, -axes]).reshape(-1, 1, 8)
    assert look_at(thoughts, TABLE).rank == pytest.approx(directions, rel=1e-4)


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
    (problem,) = look_at(thoughts, TABLE).collapse()
    assert said in problem


def test_one_thought_and_one_question_have_no_distances() -> None:
    found = look_at(drawn(1, 1), TABLE)
    assert found.within is None
    assert found.across is None
    assert found.collapse() == []
    assert "within" not in found.told()
