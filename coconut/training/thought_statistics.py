"""Collapse watch: what the thoughts of many questions look like, and whether they still say anything.

Thoughts can all become alike while the loss still falls, since the text after them can be learned without
them (SIM-CoT, arXiv 2509.20317, section 3). N questions, K thoughts, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ALIKE = 0.01  # distances below this share of the norm count as none
FLAT = 1.5  # an effective rank below this is one direction and noise


@dataclass(frozen=True)
class ThoughtStatistics:
    """Means over thoughts, or over pairs of them; distances are Euclidean, in the unit of `norm`.

    `within`: between two thoughts of a chain; None if none has two. `across`: between the thoughts of two
    questions at the same place; None if no place has two. `to_table`: to the nearest input embedding.
    `rank`: effective rank, exp of the entropy of the singular values (Roy and Vetterli 2007) of the thoughts
    less the mean of their place.
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
        """What is wrong with them, in words for a warning."""
        if not self.norm > 0:
            return ["are zero or not finite"]
        found = []
        if self.within is not None and self.within < ALIKE * self.norm:
            found.append("are the same from the first of a chain to its last")
        if self.across is not None and self.across < ALIKE * self.norm:
            found.append("are the same whatever the question")
        elif self.across is not None and self.rank < FLAT:
            found.append("differ in one direction only")
        return found


def measure_thoughts(thoughts_NKD: Tensor, table_VD: Tensor, counts_N: Tensor | None = None) -> ThoughtStatistics:
    """Statistics of thoughts (N, K, D), K at least 1, against the table of input embeddings (V, D).

    `counts_N`: how many thoughts each question has, one of them at least one, if it is not K for all; what follows a
    question's last counts for nothing.
    """
    thoughts = thoughts_NKD.detach().double().cpu()
    N, K, _ = thoughts.shape
    there_NK = torch.ones(N, K, dtype=torch.bool) if counts_N is None else torch.arange(K) < counts_N.cpu()[:, None]
    rows_RD = thoughts[there_NK]
    if not torch.isfinite(rows_RD).all():
        return ThoughtStatistics(math.nan, None, None, math.nan, math.nan)
    chains = [thoughts[n, there] for n, there in enumerate(there_NK)]
    places = [thoughts[there, k] for k, there in enumerate(there_NK.T)]
    centred_RD = torch.cat([place - place.mean(0) for place in places])
    singular = torch.linalg.svdvals(centred_RD.float())
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return ThoughtStatistics(
        norm=rows_RD.norm(dim=1).mean().item(),
        within=_mean_distance(chains),
        across=_mean_distance(places),
        to_table=_to_nearest(rows_RD, table_VD.detach()),
        rank=torch.special.entr(shares).sum().exp().item(),
    )


def _mean_distance(sets: Sequence[Tensor]) -> float | None:
    """Mean distance between two different members of a set (M, D), over the pairs of all sets; None if there is none.

    A matrix product makes squared distances as differences of squared norms, which leaves nothing of those between
    vectors that are nearly equal; so they are centred first, in float64.
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
    """Mean distance of rows to their nearest rows of the table."""
    total = 0.0
    for part in rows_RD.split(512):
        nearest = torch.cdist(part.to(table_VD.device, torch.float32), table_VD.float()).argmin(1)
        total += (part - table_VD[nearest].double().cpu()).norm(dim=1).sum().item()
    return total / len(rows_RD)
