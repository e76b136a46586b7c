"""The configuration policy, from a question's embedding to one distribution for each dimension, trained by REINFORCE.

AdaReasoner (arXiv 2505.17312), section 3: a shared layer and a softmax head for each dimension, so that parameters grow
with the sum of the dimensions' sizes and not with their product; Boltzmann exploration, P(a) = softmax(Q / tau) with
tau_t = tau_0 alpha^t; L = -r sum_j log pi_j(a_j | q). The gradient here is that of the sampling probabilities, at the
temperature. A baseline may be subtracted from the reward, which does not change the expected gradient.

Shapes: S policies trained in parallel, B questions, D embedding size, H hidden units, V values of a dimension,
T training questions, C configurations, J dimensions.
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
    """S independent policies of one shape in one module. A file holds one of them.

    Embeddings are standardized by mean and standard deviation of the training questions.
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
        """The logits Q of each dimension, (S, B, V)."""
        hidden_SBH = _affine(self.shared, (embeddings_SBD - self.mean) / self.scale).tanh()
        return [_affine(head, hidden_SBH) for head in self.heads]

    @torch.no_grad()
    def best(self, embeddings_SBD: Tensor) -> Tensor:
        """(S, B) the numbers of the most probable configurations."""
        return self.space.number([logits.argmax(-1) for logits in self(embeddings_SBD)])

    @torch.no_grad()
    def probabilities(self, embeddings_SBD: Tensor, temperature: float) -> list[Tensor]:
        """The probabilities of each dimension, (S, B, V)."""
        return [(logits / temperature).softmax(-1) for logits in self(embeddings_SBD)]

    def save(self, path: Path | str, about: dict[str, Any], copy: int = 0) -> None:
        """Save policy number `copy`, a few kilobytes, with its space and `about`, any JSON."""
        metadata = {"space": self.space.dimensions, "about": about}
        weights = {name: weight[copy : copy + 1].contiguous() for name, weight in self.state_dict().items()}
        with atomic_file(path) as part:
            save_file(weights, part, metadata={"coconut_policy": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path | str) -> tuple[ConfigurationPolicy, dict[str, Any]]:
        """A policy and its `about`. Raises FileNotFoundError or ValueError if there is none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no policy {path}. coconut adaptive writes one.")
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["coconut_policy"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is no policy of coconut adaptive ({error}).") from None
        width, hidden = weights["mean"].shape[-1], weights["shared"].shape[-1]
        policy = cls(Space.of(metadata["space"]), width, hidden)
        policy.load_state_dict(weights)
        return policy.eval(), metadata["about"]


def _linear(copies: int, inputs: int, outputs: int, scale: float = 1.0) -> nn.Parameter:
    """The weights of a linear layer for each policy, (S, inputs + 1, outputs), with the bias as the last row."""
    weight = torch.randn(copies, inputs + 1, outputs) * scale / inputs**0.5
    weight[:, -1] = 0
    return nn.Parameter(weight)


def _affine(weight: Tensor, x_SBI: Tensor) -> Tensor:
    return torch.baddbmm(weight[:, -1:], x_SBI, weight[:, :-1])


@dataclass(frozen=True)
class LearningResult:
    """S trained policies, and the history of their training.

    rewards: (updates, S) mean reward of each update. questions: (updates, S, B) indices of the sampled questions.
    entropy: (updates, S, J) at the temperature, by `entropies`.
    tried: (S,) number of different pairs of a question and a configuration. temperature: of the last update.
    """

    policy: ConfigurationPolicy
    rewards: np.ndarray
    questions: np.ndarray
    entropy: np.ndarray
    tried: np.ndarray
    temperature: float


def learn(
    space: Space, embeddings_STD: Tensor, rewards_STC: Tensor, config: PolicyConfig, *, seed: int = 0,
    fixed: Sequence[Tensor | None] | None = None,
) -> LearningResult:  # fmt: skip
    """Train S policies in parallel, each on its own T questions. The result equals S separate trainings.

    rewards_STC: a policy uses only the rewards of the configurations that it samples.
    fixed: for each dimension None, or the (S,) values to hold it at, so that only the other heads are trained.
    """
    S, T, D = embeddings_STD.shape
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        policy = ConfigurationPolicy(space, D, config.hidden, S)
    policy.fit_scale(embeddings_STD)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    each_S1 = torch.arange(S)[:, None]
    fixed_values = list(fixed or [None] * len(space.sizes))
    learned = [j for j, value in enumerate(fixed_values) if value is None]
    tried_STC = torch.zeros_like(rewards_STC, dtype=torch.bool)
    mean_S1 = torch.zeros(S, 1)
    history: dict[str, list[Tensor]] = {"rewards": [], "questions": [], "entropy": []}
    for update in range(config.updates):
        questions_SB = torch.randint(T, (S, config.batch_size), generator=generator)
        temperature = config.exploration(update)
        log_probs = [(q / temperature).log_softmax(-1) for q in policy(embeddings_STD[each_S1, questions_SB])]
        actions = [_draw(row.exp(), generator) if value is None else value[:, None].expand_as(questions_SB)
                 for row, value in zip(log_probs, fixed_values, strict=True)]  # fmt: skip
        configuration_SB = space.number(actions)
        reward_SB = rewards_STC[each_S1, questions_SB, configuration_SB]
        tried_STC[each_S1, questions_SB, configuration_SB] = True
        loss = reinforce([log_probs[j] for j in learned], [actions[j] for j in learned], reward_SB - mean_S1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if config.baseline:  # the mean of the rewards before this update
            batch_mean = reward_SB.mean(1, keepdim=True)
            mean_S1 = batch_mean if update == 0 else 0.9 * mean_S1 + 0.1 * batch_mean
        with torch.no_grad():
            history["rewards"].append(reward_SB.mean(1))
            history["questions"].append(questions_SB)
            history["entropy"].append(entropies([row.exp() for row in log_probs]))
    stacked = {name: torch.stack(rows).numpy() for name, rows in history.items()}
    tried = tried_STC.sum((1, 2)).numpy()
    return LearningResult(policy.eval(), **stacked, tried=tried, temperature=config.exploration(config.updates - 1))


def reinforce(log_probs: Sequence[Tensor], actions: Sequence[Tensor], advantages_SB: Tensor) -> Tensor:
    """The REINFORCE loss -A sum_j log pi_j(a_j | q), averaged over questions and summed over the independent policies.

    `log_probs` (S, B, V) and `actions` (S, B) of each dimension.
    """
    of_actions = [row.gather(-1, action[..., None])[..., 0] for row, action in zip(log_probs, actions, strict=True)]
    return -(advantages_SB * torch.stack(of_actions).sum(0)).mean(1).sum()


def _draw(probabilities_SBV: Tensor, generator: torch.Generator) -> Tensor:
    """(S, B) one sampled value for each question."""
    flat = torch.multinomial(probabilities_SBV.detach().flatten(0, 1), 1, generator=generator)
    return flat.view(probabilities_SBV.shape[:2])


def entropies(probabilities: Sequence[Tensor]) -> Tensor:
    """(S, J) mean entropy of each dimension's distributions over questions, divided by that of the uniform one."""
    rows = [torch.special.entr(p).sum(-1).mean(1) / np.log(p.shape[-1]) for p in probabilities]
    return torch.stack(rows, -1)


def distances(probabilities: Sequence[Tensor], limit: int = 200) -> Tensor:
    """(S, J) mean total variation distance between the distributions of two questions, among the first `limit`.

    0: the same distribution for all questions; 1: a different value for each.
    """
    sums = [torch.cdist(p, p, p=1).sum((1, 2)) / 2 for p in (p_SBV[:, :limit] for p_SBV in probabilities)]
    B = min(limit, probabilities[0].shape[1])
    return torch.stack(sums, -1) / max(B * (B - 1), 1)
