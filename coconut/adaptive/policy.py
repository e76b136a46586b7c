"""The policy: from a frozen embedding of a question to one distribution for each dimension, learned by REINFORCE.

AdaReasoner (arXiv 2505.17312), section 3: a shared layer, a softmax head a dimension, so that the parameters grow with
the sum of the dimensions' sizes and not with their product; Boltzmann exploration, P(a) = softmax(Q / tau) with
tau_t = tau_0 alpha^t; L = -r sum_j log pi_j(a_j | q). The gradient here is that of the probabilities that were sampled
from, those at the temperature; a baseline may be taken from the reward, which changes no expectation.

Shapes: S policies that learn side by side, B questions, D numbers of an embedding, H hidden units, V values of a
dimension, T questions to learn from, C configurations, J dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coconut.adaptive.config import PolicyConfig
from coconut.adaptive.space import Space
from coconut.utils.files import atomic_file
from coconut.utils.torch_utils import seeded


class ConfigurationPolicy(nn.Module):
    """S policies of one shape in one module, each with weights of its own; one of them is kept in a file.

    Embeddings are put to mean 0 and deviation 1 as they were where the policy learned.
    """

    def __init__(self, space: Space, width: int, hidden: int, copies: int = 1):
        super().__init__()
        self.space = space
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(copies, 1, width))
        self.register_buffer("scale", torch.ones(copies, 1, width))
        self.shared = _linear(copies, width, hidden)
        self.heads = nn.ParameterList([_linear(copies, hidden, size, scale=0.1) for size in space.sizes])

    def fit_scale(self, embeddings_STD: Tensor) -> None:
        self.mean = embeddings_STD.mean(1, keepdim=True)
        self.scale = embeddings_STD.std(1, keepdim=True) + 1e-6

    def forward(self, embeddings_SBD: Tensor) -> list[Tensor]:
        """Q, of each dimension (S, B, V): the logits of its softmax."""
        hidden_SBH = _affine(self.shared, (embeddings_SBD - self.mean) / self.scale).tanh()
        return [_affine(head, hidden_SBH) for head in self.heads]

    @torch.no_grad()
    def best(self, embeddings_SBD: Tensor) -> Tensor:
        """(S, B) the numbers of the configurations that are likeliest."""
        return self.space.number([logits.argmax(-1) for logits in self(embeddings_SBD)])

    @torch.no_grad()
    def probabilities(self, embeddings_SBD: Tensor, temperature: float) -> list[Tensor]:
        """Of each dimension (S, B, V)."""
        return [(logits / temperature).softmax(-1) for logits in self(embeddings_SBD)]

    def save(self, path: Path | str, about: dict[str, Any], copy: int = 0) -> None:
        """One of the policies, a few kilobytes, with its space and whatever JSON is to be known about it."""
        told = {"space": self.space.as_data(), "about": about}
        weights = {name: weight[copy : copy + 1].contiguous() for name, weight in self.state_dict().items()}
        with atomic_file(path) as part:
            save_file(weights, part, metadata={"coconut_policy": json.dumps(told)})

    @classmethod
    def load(cls, path: Path | str) -> tuple[ConfigurationPolicy, dict[str, Any]]:
        """A policy, and what is known about it. Raises FileNotFoundError or ValueError if the file holds none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no policy {path}. python -m coconut.adaptive writes one.")
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["coconut_policy"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is no policy of python -m coconut.adaptive ({error}).") from None
        width, hidden = weights["mean"].shape[-1], weights["shared"].shape[-1]
        policy = cls(Space.of(told["space"]), width, hidden)
        policy.load_state_dict(weights)
        return policy.eval(), told["about"]


def _linear(copies: int, inputs: int, outputs: int, scale: float = 1.0) -> nn.Parameter:
    """Weights, and the bias as their last row."""
    weight = torch.randn(copies, inputs + 1, outputs) * scale / inputs**0.5
    weight[:, -1] = 0
    return nn.Parameter(weight)


def _affine(weight: Tensor, x_SBI: Tensor) -> Tensor:
    return torch.baddbmm(weight[:, -1:], x_SBI, weight[:, :-1])


@dataclass(frozen=True)
class LearningResult:
    """S policies, and what happened while they learned: (updates, S) each.

    `rewards`: of what they tried. `questions` (updates, S, B): which they were asked. `entropy` (updates, S, J), at
    the temperature, see `entropies`. `tried` (S,): how many different pairs of a question and a configuration.
    `temperature`: of the last update.
    """

    policy: ConfigurationPolicy
    rewards: np.ndarray
    questions: np.ndarray
    entropy: np.ndarray
    tried: np.ndarray
    temperature: float


def learn(
    space: Space,
    embeddings_STD: Tensor,
    rewards_STC: Tensor,
    config: PolicyConfig,
    *,
    seed: int = 0,
    fixed: Sequence[Tensor | None] | None = None,
) -> LearningResult:
    """S policies side by side, each from T questions of its own and the rewards of what it tries.

    `fixed`: of each dimension None, or the values (S,) that it has throughout, so that the other heads learn alone.
    A policy sees no reward but that of the configuration that it took. Equal to S trainings one after the other.
    """
    S, T, D = embeddings_STD.shape
    random = torch.Generator().manual_seed(seed)
    with seeded(seed):
        policy = ConfigurationPolicy(space, D, config.hidden, S)
    policy.fit_scale(embeddings_STD)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    each_S1 = torch.arange(S)[:, None]
    held = list(fixed or [None] * len(space.sizes))
    tried_STC = torch.zeros_like(rewards_STC, dtype=torch.bool)
    mean_S1 = torch.zeros(S, 1)
    seen: dict[str, list[Tensor]] = {"rewards": [], "questions": [], "entropy": []}
    for update in range(config.updates):
        asked_SB = torch.randint(T, (S, config.batch_size), generator=random)
        temperature = config.exploration(update)
        log_probs = [(q / temperature).log_softmax(-1) for q in policy(embeddings_STD[each_S1, asked_SB])]
        taken = [_draw(row.exp(), random) if at is None else at[:, None].expand_as(asked_SB)
                 for row, at in zip(log_probs, held, strict=True)]  # fmt: skip
        number_SB = space.number(taken)
        reward_SB = rewards_STC[each_S1, asked_SB, number_SB]
        tried_STC[each_S1, asked_SB, number_SB] = True
        free = [j for j, at in enumerate(held) if at is None]
        loss = reinforce([log_probs[j] for j in free], [taken[j] for j in free], reward_SB - mean_S1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if config.baseline:  # the mean of the rewards before this update
            so_far = reward_SB.mean(1, keepdim=True)
            mean_S1 = so_far if update == 0 else 0.9 * mean_S1 + 0.1 * so_far
        with torch.no_grad():
            seen["rewards"].append(reward_SB.mean(1))
            seen["questions"].append(asked_SB)
            seen["entropy"].append(entropies([row.exp() for row in log_probs]))
    history = {name: torch.stack(rows).numpy() for name, rows in seen.items()}
    tried = tried_STC.sum((1, 2)).numpy()
    return LearningResult(policy.eval(), **history, tried=tried, temperature=config.exploration(config.updates - 1))


def reinforce(log_probs: Sequence[Tensor], taken: Sequence[Tensor], gains_SB: Tensor) -> Tensor:
    """-gain sum_j log pi_j(a_j | q), in the mean over questions and summed over policies, none of which moves another.

    `log_probs` (S, B, V) and `taken` (S, B) of each dimension.
    """
    chosen = [row.gather(-1, at[..., None])[..., 0] for row, at in zip(log_probs, taken, strict=True)]
    return -(gains_SB * torch.stack(chosen).sum(0)).mean(1).sum()


def _draw(probabilities_SBV: Tensor, random: torch.Generator) -> Tensor:
    """(S, B)"""
    flat = torch.multinomial(probabilities_SBV.detach().flatten(0, 1), 1, generator=random)
    return flat.view(probabilities_SBV.shape[:2])


def entropies(probabilities: Sequence[Tensor]) -> Tensor:
    """(S, J) of the distribution of each dimension, in the mean over questions, as a share of that of even odds."""
    rows = [torch.special.entr(p).sum(-1).mean(1) / np.log(p.shape[-1]) for p in probabilities]
    return torch.stack(rows, -1)


def distances(probabilities: Sequence[Tensor], limit: int = 200) -> Tensor:
    """(S, J) the mean total variation between the distributions of two different questions, of the first so many.

    0: the policy does the same for all questions; 1: each has a value of its own.
    """
    found = []
    for p_SBV in probabilities:
        p_SBV = p_SBV[:, :limit]
        B = p_SBV.shape[1]
        pairs_S = torch.stack([torch.cdist(p, p, p=1).sum() / 2 for p in p_SBV])
        found.append(pairs_S / max(B * (B - 1), 1))
    return torch.stack(found, -1)
