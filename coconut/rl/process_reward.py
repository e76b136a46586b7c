"""Dense rewards for a policy, by a reward model that learns beside it (PRIME; Cui et al., arXiv 2502.01456).

Shapes: S answers of a group, N answers of a batch, M sampled tokens of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Completion, needs, shard_by_length
from coconut.completions.rollouts import CorrectnessReward, Group
from coconut.completions.scoring import SamplingDistribution
from coconut.engine.base import Engine, NonFiniteUpdate, restore_master
from coconut.engine.factory import make_engine
from coconut.models.latent_lm import LatentLM
from coconut.rewards.batches import AnswerSet, RewardBatch, preference, reward_batch, reward_loss, scored_together
from coconut.rewards.implicit import reference_of
from coconut.rewards.losses import LOSSES, cross_entropy, get_loss
from coconut.rl.config import RLConfig
from coconut.runs.checkpoints import load_trainer
from coconut.runs.description import read_config
from coconut.runs.loading import in_float32, match_dtypes, resolve_weights, run_folder_of
from coconut.runs.state import TrainingState
from coconut.training.loop import NonFiniteLossError

REWARD_MODEL = "reward_model"  # in a checkpoint; in the run's folder, if it stays as it is
REWARD_REFERENCE = "reward_reference"  # in the run's folder, if it is not what the policy started from


def token_advantages(rewards_S: Tensor, tokens: Sequence[Tensor], weight: float) -> list[Tensor]:
    """(M,) for each answer of a group: the advantages of its tokens, of which `tokens` has the rewards r_phi.

        A_t^i = r^i - mean_{j != i} r^j  +  weight * sum_{s >= t} [r_phi,s^i - mean_{j != i} (mean_s r_phi,s^j)]

    r are the rewards of whole answers. This is the paper's printed form, leave-one-out for both kinds of reward, with
    gamma = 1. The code that was released with it adds (r_phi,s^i - mean_s r_phi,s^i) / (S - 1) to each bracket, and
    standardises all advantages of a batch.
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
class Judged:
    """A group with the rewards of its answers' sampled tokens, (M,) each.

    `reference` (S,): log-probabilities of the whole answers. `right` (S,): the judge's word, whatever they cost.
    """

    group: Group
    tokens: list[Tensor]
    reference: Tensor
    right: Tensor

    def advantages(self, weight: float) -> list[Tensor]:
        return token_advantages(self.group.rewards, self.tokens, weight)


class OnlineProcessReward:
    """A reward model beside a policy: r_phi,t = beta log pi_phi(y_t)/pi_ref(y_t).

    `policy`: the model whose answers are rewarded. `start`: what the run started from, if that is the reference, and
    `init`, where that lies. `size`: the most answers of a forward pass. Raises ValueError for a reward model that does
    not fit the policy.
    """

    def __init__(
        self,
        config: RLConfig,
        folder: Path,
        standing: TrainingState,
        judge: CorrectnessReward,
        policy: LatentLM,
        init: Path,
        start: LatentLM | None,
        device: torch.device,
        size: int,
    ):
        self.config, self.folder, self.judge, self.size = config.process_reward, folder, judge, size
        self.world, self.training_state = standing.world, standing
        self.resume_from = (
            standing.resume_from / REWARD_MODEL if standing.resume_from and config.process_reward.online else None
        )
        self.updates = standing.state.get("dense_updates", 0)
        self.lm = LatentLM.from_pretrained(standing.world.on_main_process(lambda: self._model(init)))
        if not self.resume_from:
            in_float32(self.lm)
        self.lm.eval().acceleration.mechanisms = config.engine.mechanisms
        if self.lm.special != policy.special or self.lm.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(
                f"process_reward.init={config.process_reward.init} has other tokens than the policy, whose answers "
                "it is to reward. Name "
                "a reward model that was made from the same model."
            )
        reference = start or LatentLM.from_pretrained(self._own_reference())
        self.policy = SamplingDistribution.of(self.lm.special)
        self.engine: Engine | None = None
        if config.process_reward.online:
            if self.resume_from:
                restore_master(self.lm, load_trainer(self.resume_from))
            loss = reward_loss(LOSSES["ce"], self.policy, config.process_reward.beta)
            self.engine = make_engine(self.lm, loss, config.engine, config.process_reward.optimizer, self.world)
        else:
            self.lm.to(device)
        self.reference = match_dtypes(reference, self.lm, device)

    def _model(self, init: Path) -> Path:
        if self.training_state.resume_from:
            return self.resume_from or self.folder / REWARD_MODEL
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

    def _own_reference(self) -> Path:
        return (
            self.folder / REWARD_REFERENCE if self.training_state.resume_from else reference_of(str(self.config.init))
        )

    @property
    def extra_models(self) -> dict[str, Engine]:
        """What is kept in checkpoints."""
        return {REWARD_MODEL: self.engine} if self.engine else {}

    def keep(self) -> None:
        """Copies in the run's folder of what does not change, since where it came from may go."""
        if self.config.init:
            self.training_state.snapshot_model(self.folder / REWARD_REFERENCE, self.reference)
        if not self.engine:
            self.training_state.snapshot_model(self.folder / REWARD_MODEL, self.lm)

    def dry_run(self, samples: Sequence[Completion]) -> None:
        if self.engine:
            nothing_N = torch.zeros(len(samples))
            self.engine.dry_run(self._batch(samples, nothing_N, nothing_N.bool(), 1))

    def resume(self) -> None:
        """Go on where the checkpoint was written. After a rehearsal."""
        if self.engine and self.resume_from:
            self.engine.load_state_dict(load_trainer(self.resume_from))

    def rewards(self, groups: Sequence[Group]) -> list[Judged]:
        """Of all answers of a batch, by the reward model as it is before it learns from them.

        The paper's "single forward"; an update with them and one of the policy may follow in either order.
        """
        self.world.set_activity("rewarding tokens")
        samples = [sample for group in groups for sample in group.completions]
        with self._whole() as lm:

            def score(share: Sequence[Completion]) -> list[tuple[Tensor, Tensor]]:
                mine, its = (self.policy.score(model, share, self.size) for model in (lm, self.reference))
                return list(zip(mine, its, strict=True))

            scored = iter(scored_together(score, samples, self.world))
        return [self._judged(group, [next(scored) for _ in group.completions]) for group in groups]

    def _whole(self) -> AbstractContextManager[Any]:
        return self.engine.full_module() if self.engine else nullcontext(self.lm)

    def _judged(self, group: Group, scored: Sequence[tuple[Tensor, Tensor]]) -> Judged:
        return Judged(
            group,
            tokens=[self.config.beta * (mine - its) for mine, its in scored],
            reference=torch.stack([its.sum() for _, its in scored]),
            right=torch.tensor([self.judge.right(group.example, sample.text) for sample in group.completions]),
        )

    @staticmethod
    def described(judged: Sequence[Judged]) -> dict[str, float]:
        """What a reward model makes of a batch: its cross-entropy, the mean rewards of right and of wrong answers, and
        the share of pairs of a right and a wrong answer to one question that it orders rightly.

        What there is nothing to tell of is left out.
        """
        rewards_N = torch.stack([row.sum() for its in judged for row in its.tokens])
        right_N = torch.cat([its.right for its in judged])
        found = {"dense_loss": float(cross_entropy(rewards_N, right_N).mean())}
        for name, kind_N in (("right", right_N), ("wrong", ~right_N)):
            if kind_N.any():
                found[f"dense_reward_{name}"] = float(rewards_N[kind_N].mean())
        if any(its.right.any() and not its.right.all() for its in judged):
            question_N = np.repeat(np.arange(len(judged)), [len(its.tokens) for its in judged])
            answers = AnswerSet([], right_N.numpy(), question_N)
            found["dense_pairs"] = preference(rewards_N.numpy(), answers)["pairs"]
        return found

    def update(self, judged: Sequence[Judged]) -> dict[str, float]:
        """Learn which of these answers are right, by cross-entropy; a reward model that stays as it is does not."""
        if not self.engine:
            return {}
        self.world.set_activity(f"in update {self.updates + 1} of the reward model")
        samples = [sample for its in judged for sample in its.group.completions]
        reference_N, right_N = torch.cat([its.reference for its in judged]), torch.cat([its.right for its in judged])
        needed = [needs([sample]) for sample in samples]
        rows = [*samples, samples[0].without_targets()]  # place -1 is the muted one
        parts = []
        for places, passes in shard_by_length(needed, self.size, self.world.rank, self.world.size):
            counted = [place for place in places if place >= 0]
            parts.append(self._batch([rows[i] for i in places], reference_N[counted], right_N[counted], passes))
        lr = self.config.optimizer.learning_rate(self.updates)
        try:
            done = self.engine.update(parts, lr)
        except NonFiniteUpdate as error:
            raise NonFiniteLossError(
                f"The loss of update {self.updates + 1} of the reward model is {error.loss}, its gradient norm "
                f"{error.grad_norm}. It was not applied. Lower process_reward.optimizer.lr, or set "
                "process_reward.optimizer.max_grad_norm=1."
            ) from error
        self.updates += 1
        return {"dense_grad_norm": done.grad_norm, "dense_lr": lr}

    def _batch(self, samples: Sequence[Completion], reference_N: Tensor, right_N: Tensor, passes: int) -> RewardBatch:
        return reward_batch(
            samples, reference_N, right_N, self.lm.special, max(passes, *(sample.passes for sample in samples))
        )
