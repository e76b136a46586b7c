"""Collapse watch: what the thoughts of many questions look like, and whether they still say anything.

Thoughts can all become alike while the loss still falls, since the text after them can be learned without
them (SIM-CoT, arXiv 2509.20317, section 3). N questions, K thoughts, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ALIKE = 0.01  # distances below this share of the norm count as none
FLAT = 1.5  # an effective rank below this is one direction and noise


@dataclass(frozen=True)
class Thoughts:
    """Means over questions; distances are Euclidean, in the unit of `norm`.

    `within`: between two thoughts of a chain; None if it has one. `across`: between the thoughts of two
    questions at the same place; None if there is one question. `to_table`: to the nearest input embedding.
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

    def told(self) -> str:
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


def look_at(thoughts_NKD: Tensor, table_VD: Tensor) -> Thoughts:
    """Statistics of thoughts (N, K, D), K at least 1, against the table of input embeddings (V, D)."""
    thoughts = thoughts_NKD.detach().to(table_VD.device).float()
    N, K, D = thoughts.shape
    rows = thoughts.reshape(N * K, D)
    table = table_VD.detach().float()
    if not torch.isfinite(rows).all():
        return Thoughts(math.nan, None, None, math.nan, math.nan)
    nearest = torch.cat([torch.cdist(part, table).amin(1) for part in rows.split(512)])
    singular = torch.linalg.svdvals((thoughts - thoughts.mean(0)).reshape(N * K, D))
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return Thoughts(
        norm=rows.norm(dim=1).mean().item(),
        within=_mean_distance(thoughts) if K > 1 else None,
        across=_mean_distance(thoughts.transpose(0, 1)) if N > 1 else None,
        to_table=nearest.mean().item(),
        rank=torch.special.entr(shares).sum().exp().item(),
    )


def _mean_distance(sets: Tensor) -> float:
    """Mean distance between two different members of a set, over sets (S, M, D)."""
    members = sets.shape[1]
    return (torch.cdist(sets, sets).sum((1, 2)) / (members * (members - 1))).mean().item()
