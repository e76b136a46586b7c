"""Noisy thoughts: continuous thoughts that are drawn, and so have a density.

Thought k of a completion is z_k ~ N(mu_k, sigma^2 I), where mu_k is the model's own thought after the question and the
drawn thoughts before it (`generate(thought_noise=sigma)`). All z_k being given, one forward pass has all mu_k.

Shapes: K thoughts, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from coconut.models.losses import at_least_float32

if TYPE_CHECKING:
    from coconut.methods import Reasoning


@dataclass(frozen=True)
class NoisyThoughts:
    """The thoughts of one completion as they were fed, and their means at sampling: both (K, D), float32."""

    fed: Tensor
    means: Tensor


def log_density_ratio(thoughts: Tensor, means: Tensor, other_means: Tensor, sigma: float) -> Tensor:
    """(...) log N(thoughts; means, sigma^2 I) - log N(thoughts; other_means, sigma^2 I) of (..., D), at least float32.

    Computed as (mu - nu) . (2 z - mu - nu) / (2 sigma^2): the two squares, each near D / 2, do not cancel, and equal
    means give exactly 0.
    """
    z, mu, nu = (at_least_float32(values) for values in (thoughts, means, other_means))
    return ((mu - nu) * ((z - mu) + (z - nu))).sum(-1) / (2 * sigma**2)


def refuse_noise(reasoning: Reasoning, sigma: float) -> None:
    """Raise ValueError if this model has no thoughts that can be drawn one after the other."""
    if reasoning.modes:
        why = "the thoughts of a hybrid model's modes are fed without noise"
    elif not reasoning.slot.thinks or not reasoning.num_thoughts:
        why = "it has no latent thoughts to draw"
    elif reasoning.slot.merges:
        why = "it ends its thoughts itself, a decision that has no probability here"
    elif not (why := reasoning.slot.cannot_be_given):
        return
    raise ValueError(
        f"thought_noise={sigma:g} is not for {reasoning.method}: {why}. Leave it out, or start from a model whose "
        "thoughts are computed one after the other, such as method=coconut."
    )


def dispersion(means: Tensor) -> float:
    """The root mean square deviation, per coordinate, of means (N, K, D) from the average of their place."""
    return math.sqrt(float((means - means.mean(0)).double().square().mean()))
