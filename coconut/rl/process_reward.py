"""Process rewards for a policy, by a reward model that learns beside it (PRIME; Cui et al., arXiv 2502.01456).

Shapes: S completions of a group, N completions of a step, M sampled tokens of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Completion, passes_and_length, shard_by_length
from coconut.completions.rollouts import CorrectnessReward, Group
from coconut.completions.scoring import SamplingDistribution
from coconut.engine.base import Engine, Loss
from coconut.engine.factory import make_engine
from coconut.models.latent_lm import LatentLM
from coconut.rewards.batches import AnswerSet, reward_batch, reward_loss, score_across_processes
from coconut.rewards.implicit import reference_of
from coconut.rewards.losses import LOSSES, cross_entropy, get_loss
from coconut.rl.config import RLConfig
from coconut.runs.description import read_config
from coconut.runs.loading import match_dtypes, resolve_weights, run_folder_of, to_float32
from coconut.runs.state import TrainingState

REWARD_MODEL = "reward_model"  # in a checkpoint; in the run's folder, if it is frozen
REWARD_REFERENCE = "reward_reference"  # in the run's folder, if it is not what the policy started from


def token_advantages(rewards_S: Tensor, tokens: Sequence[Tensor], weight: float) -> list[Tensor]:
    """The advantages (M,) of the tokens of each completion of a group; `tokens` are their rewards r_phi.

        A_t^i = r^i - mean_{j != i} r^j  +  weight * sum_{s >= t} [r_phi,s^i - mean_{j != i} (mean_s r_phi,s^j)]

    r are the rewards of whole completions. This is the paper's printed form: leave-one-out for both kinds of reward,
    gamma = 1. The code that was released with it adds (r_phi,s^i - mean_s r_phi,s^i) / (S - 1) to each bracket, and
    standardises all advantages of a step.
    """
    others = len(tokens) - 1
    outcome_S = rewards_S - (rewards_S.sum() - rewards_S) / others
    means_S = torch.stack([row.sum() / max(len(row), 1) for row in tokens])
    baseline_S = (means_S.sum() - means_S) / others
    return [
        outcome + weight * (row - baseline).flip(0).cumsum(0).flip(0)
        for row, outcome, baseline in zip(tokens, outcome_S, baseline_S, strict=True)
    ]


@dataclass(frozen=True)
class TokenRewards:
    """A group with the rewards of each completion's sampled tokens, (M,) each.

    `reference` (S,): the reference's log-probabilities of whole completions. `right` (S,): whether they are right,
    whatever they cost.
    """

    group: Group
    tokens: list[Tensor]
    reference: Tensor
    right: Tensor

    def advantages(self, weight: float) -> list[Tensor]:
        return token_advantages(self.group.rewards, self.tokens, weight)


class OnlineProcessReward:
    """A reward model beside a policy: r_phi,t = beta log pi_phi(y_t)/pi_ref(y_t).

    `policy`: the model whose completions are rewarded; `init`: the folder that it started from. `reference`: the
    reference, if that is the model that the policy started from. `batch_size`: the most completions of a forward pass.
    Raises ValueError for a reward model that does not fit the policy.
    """

    def __init__(
        self, config: RLConfig, training_state: TrainingState, judge: CorrectnessReward, policy: LatentLM, init: Path,
        reference: LatentLM | None, device: torch.device, batch_size: int,
    ):  # fmt: skip
        self.config, self.judge, self.batch_size = config.process_reward, judge, batch_size
        self.training_state, self.world, self.folder = training_state, training_state.world, training_state.folder
        self.updates = training_state.state.get("process_reward_updates", 0)
        if training_state.resume_from and self.config.online:
            self.lm = training_state.load_model(REWARD_MODEL)
        else:
            self.lm = to_float32(LatentLM.from_pretrained(self.world.on_main_process(lambda: self._initial(init))))
        self.lm.eval().acceleration.mechanisms = config.engine.mechanisms
        if self.lm.special != policy.special or self.lm.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(
                f"process_reward.init={self.config.init} has other tokens than the policy, whose completions it is to "
                "reward. Name a reward model that was made from the same model."
            )
        if not reference:
            copy = self.folder / REWARD_REFERENCE if training_state.resume_from else None
            reference = LatentLM.from_pretrained(copy or reference_of(str(self.config.init)))
        self.distribution = SamplingDistribution.of(self.lm.special, thought_noise=config.thought_noise)
        self.engine: Engine | None = None
        if self.config.online:
            loss = reward_loss(LOSSES["ce"], self.distribution, self.config.beta)
            self.engine = make_engine(self.lm, Loss(loss), config.engine, self.config.optimizer, self.world)
        else:
            self.lm.to(device)
        self.reference = match_dtypes(reference, self.lm, device)

    def _initial(self, init: Path) -> Path:
        """The folder of the reward model that the run starts from; of a resumed run, its copy."""
        if self.training_state.resume_from:
            return self.folder / REWARD_MODEL
        if not self.config.init:
            return init
        reference_of(self.config.init)
        trained = read_config(run_folder_of(self.config.init))
        if get_loss(trained["loss"]).is_value_model:
            raise ValueError(
                f"{self.config.init} was trained with loss={trained['loss']}: it says what prefixes are worth, and has "
                "no implicit rewards. Name a model of another loss with process_reward.init=RUN."
            )
        beta = trained["beta"]
        if beta != self.config.beta:
            raise ValueError(
                f"process_reward.beta is {self.config.beta:g}, and {self.config.init} was trained with {beta:g}. Set "
                f"process_reward.beta={beta:g}; process_reward.weight says how much its rewards count."
            )
        return resolve_weights(self.config.init)

    @property
    def extra_models(self) -> dict[str, Engine]:
        """What checkpoints save beside the policy."""
        return {REWARD_MODEL: self.engine} if self.engine else {}

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.config.optimizer.learning_rate(self.updates)

    def snapshot_models(self) -> None:
        """Copy the models that stay as they are to the run's folder: where they came from may be removed."""
        if self.config.init:
            self.training_state.snapshot_model(self.folder / REWARD_REFERENCE, self.reference)
        if not self.engine:
            self.training_state.snapshot_model(self.folder / REWARD_MODEL, self.lm)

    def dry_run(self, completions: Sequence[Completion]) -> None:
        if self.engine:
            zeros_N, (passes, _) = torch.zeros(len(completions)), passes_and_length(completions)
            self.engine.dry_run(reward_batch(completions, zeros_N, zeros_N.bool(), self.lm.special, passes))

    def rewards(self, groups: Sequence[Group]) -> list[TokenRewards]:
        """The rewards of all completions of a step, by the reward model before it learns from them.

        The paper's "single forward". The policy may be updated with them before or after the reward model.
        """
        self.world.set_activity("rewarding tokens")
        completions = [completion for group in groups for completion in group.completions]
        with self.engine.full_module() if self.engine else nullcontext(self.lm) as lm:

            def score(share: Sequence[Completion]) -> list[tuple[Tensor, Tensor]]:
                own, reference = (self.distribution.score(m, share, self.batch_size) for m in (lm, self.reference))
                return list(zip(own, reference, strict=True))

            scores = iter(score_across_processes(score, completions, self.world))
        rewarded = []
        for group in groups:
            own, reference = zip(*(next(scores) for _ in group.completions), strict=True)
            tokens = [self.config.beta * (a_M - b_M) for a_M, b_M in zip(own, reference, strict=True)]
            right = [self.judge.is_correct(group.example, completion.text) for completion in group.completions]
            reference_S = torch.stack([reference_M.sum() for reference_M in reference])
            rewarded.append(TokenRewards(group, tokens, reference_S, torch.tensor(right)))
        return rewarded

    @staticmethod
    def statistics(rewarded: Sequence[TokenRewards]) -> dict[str, float]:
        """The cross-entropy of a step's rewards, the mean rewards of right and of wrong completions, and the share of
        pairs of a right and a wrong completion to one question that they order rightly.

        A mean or share over nothing is left out.
        """
        rewards_N = torch.stack([row_M.sum() for group in rewarded for row_M in group.tokens])
        right_N = torch.cat([group.right for group in rewarded])
        row = {"process_reward_loss": float(cross_entropy(rewards_N, right_N).mean())}
        for name, chosen_N in (("right", right_N), ("wrong", ~right_N)):
            if chosen_N.any():
                row[f"process_reward_{name}"] = float(rewards_N[chosen_N].mean())
        if any(group.right.any() and not group.right.all() for group in rewarded):
            question_N = np.repeat(np.arange(len(rewarded)), [len(group.tokens) for group in rewarded])
            answers = AnswerSet([], right_N.numpy(), question_N)
            row["process_reward_pairs"] = answers.preference_metrics(rewards_N.numpy())["pairs"]
        return row

    def update(self, rewarded: Sequence[TokenRewards]) -> dict[str, float]:
        """Learn by cross-entropy which completions are right. Does nothing if the reward model is frozen."""
        if not self.engine:
            return {}
        self.world.set_activity(f"in update {self.updates + 1} of the reward model")
        completions = [completion for group in rewarded for completion in group.group.completions]
        reference_N = torch.cat([group.reference for group in rewarded])
        right_N = torch.cat([group.right for group in rewarded])
        needed = [passes_and_length([completion]) for completion in completions]
        rows = [*completions, completions[0].without_targets()]  # index -1, for a process that has none left
        parts = []
        for places, passes in shard_by_length(needed, self.batch_size, self.world.rank, self.world.size):
            counted, batch = [place for place in places if place >= 0], [rows[i] for i in places]
            parts.append(reward_batch(batch, reference_N[counted], right_N[counted], self.lm.special, passes))
        lr = self.lr
        result = self.engine.update(parts, lr)
        self.updates += 1
        return {"process_reward_grad_norm": result.grad_norm, "process_reward_lr": lr}
