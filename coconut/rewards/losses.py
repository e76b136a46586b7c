"""Losses of reward models on the rewards of whole completions. Rewards enter as logits, which is numerically stable.

A completion's reward is r = beta log pi(y)/pi_ref(y), summed over its tokens (Yuan et al., arXiv 2412.01981, eq. 4);
its label l is 1 if the answer is right. Shapes: N completions, P pairs of a right and a wrong completion of one
question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(rewards_N: Tensor, labels_N: Tensor) -> Tensor:
    """(N,) -[l log sigma(r) + (1 - l) log sigma(-r)] (arXiv 2412.01981, section 3)."""
    return F.binary_cross_entropy_with_logits(rewards_N, labels_N.to(rewards_N), reduction="none")


def dpo(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """(P,) -log sigma(r_w - r_l) (Rafailov et al., arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(better_P - worse_P)


def nca(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """(P,) -log sigma(r_w) - .5 [log sigma(-r_w) + log sigma(-r_l)] (Chen et al., arXiv 2402.05369, eq. 14)."""
    return -F.logsigmoid(better_P) - 0.5 * (F.logsigmoid(-better_P) + F.logsigmoid(-worse_P))


def kto(rewards_N: Tensor, labels_N: Tensor, reference_point: Tensor, weight: float = 1.0) -> Tensor:
    """(N,) weight (1 - sigma(r - z)) for a right completion, 1 - sigma(z - r) for a wrong one.

    reference_point: z, a scalar without gradient: the mean reward of the update, clamped at 0 (Ethayarajh et al.,
        arXiv 2402.01306, eq. 8, where it estimates the KL divergence).
    weight: wrong completions for each right one, so that both kinds weigh the same, as the paper advises.
    """
    apart_N = rewards_N - reference_point
    right_N = labels_N.bool()
    missed_N = torch.sigmoid(torch.where(right_N, -apart_N, apart_N))
    return torch.where(right_N, weight * missed_N, missed_N)


@dataclass(frozen=True)
class Loss:
    """A loss, and what it takes.

    pairs: rewards of right and of wrong completions, (P,) each, in place of rewards and labels, (N,) each.
    uses_reference_point: also the reference point and the weight of right completions.
    is_value_model: values of prefixes (coconut.rewards.value_model) in place of rewards.
    """

    of: Callable[..., Tensor]
    pairs: bool = False
    uses_reference_point: bool = False
    is_value_model: bool = False


LOSSES: dict[str, Loss] = {
    "ce": Loss(cross_entropy),
    "kto": Loss(kto, uses_reference_point=True),
    "dpo": Loss(dpo, pairs=True),
    "nca": Loss(nca, pairs=True),
    "value": Loss(cross_entropy, is_value_model=True),
}


def get_loss(name: str) -> Loss:
    """The entry of LOSSES. Raises ValueError, which lists the names, if there is none."""
    if name not in LOSSES:
        raise ValueError(f"There is no loss {name!r}. The losses are: {', '.join(LOSSES)}.")
    return LOSSES[name]
