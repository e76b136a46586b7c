"""Representation drift: how far the thoughts of the same questions move from one validation to the next.

Without supervision of the thoughts themselves nothing holds them in place while the loss falls (Chen et al., arXiv
2606.20075, who name this drift and attenuated gradients the dual collapse of latent reasoning).

The measure is the Euclidean distance as a share of the norm, not the cosine distance. Thoughts are fed as they are, so
that a change of length is a change too; a cosine distance is the square of a small movement, which makes 10 % of the
norm 0.005; and the distances `thought_within` and `thought_across` of the same row are on the same scale.

Shapes: N questions, K thoughts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coconut.utils.torch_utils import spread_indices

MAX_QUESTIONS = 256  # whose thoughts a checkpoint keeps


@dataclass(frozen=True)
class SeenThoughts:
    """The thoughts (N, K, D) of a validation in this stage, on the CPU, and how many of them each question has."""

    stage: int
    thoughts_NKD: Tensor
    counts_N: Tensor

    @classmethod
    def of(cls, stage: int, thoughts_NKD: Tensor, counts_N: Tensor) -> SeenThoughts:
        """Those of at most MAX_QUESTIONS questions, which are evenly spaced among all."""
        chosen = spread_indices(len(thoughts_NKD), MAX_QUESTIONS)
        return cls(stage, thoughts_NKD.detach().cpu()[chosen], counts_N.cpu()[chosen])

    def drift_since(self, before: SeenThoughts | None) -> list[float | None] | None:
        """For each thought, the mean distance to the same thought `before`, as a share of its mean norm then.

        None if there was no validation before in this stage: in another one the places of thoughts mean other things.
        A thought that no question has in both is None. Left out are questions with another number of thoughts than
        before, as those that a hybrid model answers in another mode.
        """
        if before is None or before.stage != self.stage:
            return None
        counts_N = torch.where(self.counts_N == before.counts_N, self.counts_N, 0)
        return [
            _drift(before.thoughts_NKD[counts_N > k, k], self.thoughts_NKD[counts_N > k, k])
            for k in range(self.thoughts_NKD.shape[1])
            if k < before.thoughts_NKD.shape[1]
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "thoughts": self.thoughts_NKD, "counts": self.counts_N}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> SeenThoughts | None:
        """What `state_dict` gave, copied."""
        return cls(state["stage"], state["thoughts"].clone(), state["counts"].clone()) if state else None


def _drift(before_MD: Tensor, after_MD: Tensor) -> float | None:
    norms_M = before_MD.double().norm(dim=1)
    if not norms_M.sum() > 0:
        return None
    return float((after_MD.double() - before_MD.double()).norm(dim=1).sum() / norms_M.sum())
