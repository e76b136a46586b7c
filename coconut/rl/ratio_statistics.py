"""How far an update has moved from the policy that sampled: log-ratios and clipping, of noisy thoughts and of words.

Shapes: M sampled tokens and thoughts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RatioStatistics:
    """Collects sums over micro-batches."""

    parts: list[Tensor] = field(default_factory=list)  # (2, 3) each: of thoughts and words; log-ratios, clipped, count

    def add(self, log_ratios_M: Tensor, is_clipped_M: Tensor, is_thought_M: Tensor) -> None:
        values_M3 = torch.stack([log_ratios_M.detach(), is_clipped_M, torch.ones_like(log_ratios_M)], dim=1)
        self.parts.append(torch.stack([values_M3[is_thought_M].sum(0), values_M3[~is_thought_M].sum(0)]))

    def means(self, all_reduce_sums: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all micro-batches and processes since the last call."""
        sums_23 = all_reduce_sums(torch.stack([part.cpu() for part in self.parts]).double().sum(0))
        self.parts.clear()
        row = {}
        for name, (log_ratio, clipped, count) in zip(("thought", "word"), sums_23.tolist(), strict=True):
            if count:
                row |= {f"{name}_log_ratio": log_ratio / count, f"{name}_clipped": clipped / count}
        return row
