"""Statistics of the thoughts of many questions, which detect a collapse of the latent space.

Thoughts can all become alike while the loss still falls, since the text after them can be learned without
them (SIM-CoT, arXiv 2509.20317, section 3).

Shapes: N questions, K thoughts, D hidden size, V vocabulary, R thoughts of all questions, M members of a set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from coconut.utils.torch_utils import effective_rank

MIN_DISTANCE = 0.01  # thoughts that are closer than this share of their norm count as equal
MIN_RANK = 1.5  # a smaller effective rank is one direction and noise


@dataclass(frozen=True)
class ThoughtStatistics:
    """Mean norm and mean Euclidean distances of thoughts.

    `within`: between two thoughts of one question; None if no question has two. `across`: between the thoughts of two
    questions at the same index; None if no index has two. `to_table`: to the nearest input embedding. `rank`: effective
    rank, exp of the entropy of the singular values (Roy and Vetterli 2007), of the thoughts minus the mean of their
    index.
    """

    norm: float
    within: float | None
    across: float | None
    to_table: float
    rank: float

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def describe(self) -> str:
        parts = {"norm": self.norm, "within a chain": self.within, "across questions": self.across, "rank": self.rank}
        return ", ".join(f"{name} {value:.3g}" for name, value in parts.items() if value is not None)

    def collapse(self) -> list[str]:
        """The signs of a collapse, as text for a warning."""
        if not self.norm > 0:
            return ["are zero or not finite"]
        found = []
        if self.within is not None and self.within < MIN_DISTANCE * self.norm:
            found.append("are the same from the first of a chain to its last")
        if self.across is not None and self.across < MIN_DISTANCE * self.norm:
            found.append("are the same whatever the question")
        elif self.across is not None and self.rank < MIN_RANK:
            found.append("differ in one direction only")
        return found


def measure_thoughts(thoughts_NKD: Tensor, table_VD: Tensor, counts_N: Tensor | None = None) -> ThoughtStatistics:
    """Statistics of thoughts (N, K, D) with the input embeddings (V, D). There is at least one thought.

    `counts_N`: how many thoughts each question has, by default K. What follows a question's last one is ignored.
    """
    thoughts = thoughts_NKD.detach().double().cpu()
    N, K, _ = thoughts.shape
    counts_N = torch.full((N,), K) if counts_N is None else counts_N.cpu()
    is_thought_NK = torch.arange(K) < counts_N[:, None]
    rows_RD = thoughts[is_thought_NK]
    if not torch.isfinite(rows_RD).all():
        return ThoughtStatistics(math.nan, None, None, math.nan, math.nan)
    chains = [thoughts[n, is_thought_K] for n, is_thought_K in enumerate(is_thought_NK)]
    by_index = [thoughts[is_thought_N, k] for k, is_thought_N in enumerate(is_thought_NK.T)]
    centred_RD = torch.cat([thoughts_MD - thoughts_MD.mean(0) for thoughts_MD in by_index])
    return ThoughtStatistics(
        norm=rows_RD.norm(dim=1).mean().item(),
        within=_mean_distance(chains),
        across=_mean_distance(by_index),
        to_table=_to_nearest(rows_RD, table_VD.detach()),
        rank=effective_rank(centred_RD),
    )


def _mean_distance(sets: Sequence[Tensor]) -> float | None:
    """Mean distance between two members of a set (M, D), over the pairs of all sets; None if there are no pairs.

    With a matrix product a squared distance is a difference of squared norms, which loses the distance between nearly
    equal vectors. Sets are therefore centred first, in float64.
    """
    total, pairs = 0.0, 0
    for members_MD in sets:
        if (count := len(members_MD)) > 1:
            centred_MD = members_MD - members_MD.mean(0)
            distances_MM = torch.cdist(centred_MD, centred_MD, compute_mode="use_mm_for_euclid_dist")
            total += distances_MM.triu(1).sum().item()
            pairs += count * (count - 1) // 2
    return total / pairs if pairs else None


def _to_nearest(rows_RD: Tensor, table_VD: Tensor) -> float:
    """Mean distance of rows to their nearest rows of a table."""
    total = 0.0
    for part in rows_RD.split(512):
        nearest = torch.cdist(part.to(table_VD.device, torch.float32), table_VD.float()).argmin(1)
        total += (part - table_VD[nearest].double().cpu()).norm(dim=1).sum().item()
    return total / len(rows_RD)
