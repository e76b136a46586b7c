"""Policy objectives, GRPO and its variants, as data.

All of them minimise, over the sampled tokens t (and noisy thoughts) of the completions i of one batch,

    sum w_it * max(-rho_it A_i, -clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)  +  kl_coef * sum v_it * k3_it

where rho is the ratio of the token's probability under the current policy to that at sampling, A the completion's
advantage in its group, and k3 an estimate of the KL divergence from the reference model. An `Objective` defines how A
is normalized, and the weights w and v.

Shapes: G groups, S completions of a group, N = G * S completions in that order, M sampled tokens of all completions,
one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STD_EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL


@dataclass(frozen=True)
class Totals:
    """Counts of the whole batch, over all processes. `tokens`: sampled tokens, of which `controls` are control tokens.

    `budget`: the most sampled tokens of a completion, without the control token. Noisy thoughts count as tokens.
    """

    completions: int
    tokens: int
    controls: int
    budget: int


Denominator = Callable[["Tensor", Totals], "Tensor"]
"""From lengths (N,) and totals to (N,): what the sum over a completion's tokens is divided by."""


def per_completion(lengths_N: Tensor, totals: Totals) -> Tensor:
    """The mean over completions of the mean over their tokens."""
    return lengths_N.clamp(min=1) * totals.completions


def per_token(lengths_N: Tensor, totals: Totals) -> Tensor:
    """The mean over all tokens of the batch."""
    return lengths_N.new_full(lengths_N.shape, totals.tokens)


def per_budget(lengths_N: Tensor, totals: Totals) -> Tensor:
    """The sum over tokens divided by a constant, completions times budget, so that length does not matter."""
    return lengths_N.new_full(lengths_N.shape, totals.completions * totals.budget)


@dataclass(frozen=True)
class Objective:
    """A policy objective.

    denominator: how the sum over tokens is averaged.
    normalize_advantages: divide advantages by the group's standard deviation.
    control_token_weight: the weight of the control token as a term of its own: the loss is then the mean over
        completions of this term and of the average over the other tokens. None: a token like the others.
    control_token_scale: a factor on the control token's weight.
    clip_low, clip_high: the probability ratio is clipped to [1 - clip_low, 1 + clip_high].
    """

    denominator: Denominator
    normalize_advantages: bool = False
    control_token_weight: float | None = None
    control_token_scale: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2

    def weights(self, lengths_N: Tensor, is_control_M: Tensor, totals: Totals) -> tuple[Tensor, Tensor]:
        """w and v, both (M,), float32. `lengths_N`: sampled tokens of each completion, with the control token."""
        import torch  # not for --help

        owner_M = torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)
        whole_M = 1 / self.denominator(lengths_N, totals).float()[owner_M]
        if self.control_token_weight is None:
            return torch.where(is_control_M, self.control_token_scale * whole_M, whole_M), whole_M
        controls_N = torch.zeros_like(lengths_N).scatter_add(0, owner_M, is_control_M.to(lengths_N))
        other_totals = replace(totals, tokens=totals.tokens - totals.controls, controls=0)
        rest_M = 1 / self.denominator(lengths_N - controls_N, other_totals).float()[owner_M]
        alone = self.control_token_scale * self.control_token_weight / totals.completions
        return torch.where(is_control_M, torch.full_like(rest_M, alone), rest_M), whole_M

    def clipped(self, log_probs_M: Tensor, old_M: Tensor, advantages_M: Tensor) -> Tensor:
        """(M,) each token's clipped surrogate loss, to be minimised (PPO; Schulman et al., arXiv 1707.06347, eq. 7)."""
        ratio_M = (log_probs_M - old_M).exp()
        clipped_M = ratio_M.clamp(1 - self.clip_low, 1 + self.clip_high)
        return (-ratio_M * advantages_M).maximum(-clipped_M * advantages_M)

    def is_clipped(self, log_ratios_M: Tensor, advantages_M: Tensor) -> Tensor:
        """(M,) whether clipping takes a token's gradient away."""
        ratio_M = log_ratios_M.exp()
        above_M = (ratio_M > 1 + self.clip_high) & (advantages_M > 0)
        return above_M | ((ratio_M < 1 - self.clip_low) & (advantages_M < 0))


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(per_completion, normalize_advantages=True),  # Shao et al., arXiv 2402.03300, eq. 3
    "dr_grpo": Objective(per_budget),  # Liu et al., arXiv 2503.20783, section 3.2
    "dapo": Objective(per_token, normalize_advantages=True, clip_high=0.28),  # Yu et al., arXiv 2503.14476, eq. 8
    "degrpo": Objective(per_completion, control_token_weight=1e-3),  # Fang et al., arXiv 2505.13379, eq. 8
}


def get_objective(name: str, **changes: Any) -> Objective:
    """The entry of OBJECTIVES, with its fields replaced by those of `changes` that are not None.

    Raises ValueError, which lists the names, if there is no such entry.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"There is no objective {name!r}. The objectives are: {', '.join(OBJECTIVES)}.")
    return replace(OBJECTIVES[name], **{key: value for key, value in changes.items() if value is not None})


def advantages(rewards_GS: Tensor, normalize: bool) -> Tensor:
    """(G, S) each reward minus the mean of its group; divided by the group's standard deviation with `normalize`.

    Raises ValueError for groups of one, whose advantages would be zero.
    """
    if rewards_GS.shape[1] < 2:
        raise ValueError("A group of one completion has no other to be compared with. Sample two or more a question.")
    centred_GS = rewards_GS - rewards_GS.mean(1, keepdim=True)
    return centred_GS / (rewards_GS.std(1, keepdim=True) + STD_EPSILON) if normalize else centred_GS


def has_zero_variance(rewards_GS: Tensor) -> Tensor:
    """(G,) whether all rewards of a group are equal: its advantages are zero, and it gives no gradient."""
    return (rewards_GS == rewards_GS[:, :1]).all(1)


def kl_k3(log_probs_M: Tensor, reference_M: Tensor) -> Tensor:
    """(M,) the k3 estimate of KL(policy || reference), never negative (http://joschu.net/blog/kl-approx.html)."""
    apart_M = reference_M - log_probs_M
    return apart_M.expm1() - apart_M
