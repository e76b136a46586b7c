"""Score sampled answers with a reward model: `coconut evaluate reward=RUN` chooses the best of n by these scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coconut.completions.completion import completion_from_ids
from coconut.engine.world import World
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.sampling import AnswerScore
from coconut.generation.generate import Generated
from coconut.generation.thoughts import NO_NOISE, ThoughtNoise
from coconut.models.latent_lm import LatentLM
from coconut.rewards.implicit import ImplicitReward, reference_of
from coconut.rewards.losses import get_loss
from coconut.rewards.thoughts import answer_rewards
from coconut.rewards.value_model import ValueModel
from coconut.runs.description import read_config
from coconut.runs.loading import load_model, match_dtypes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnswerReward:
    """An `AnswerScorer`: the reward of a whole answer.

    Of an implicit reward model it is the sum over the answer's tokens; of a value model the last value, the probability
    that the answer is right. `noise`: how the thoughts of the answers were changed. Without it, and with a value model,
    the text is read after the reward model's own thoughts. With it an implicit reward model reads the text after the
    thoughts that were fed, and the thoughts have a reward as well (`coconut.rewards.thoughts.answer_rewards`).
    """

    model: ImplicitReward | ValueModel
    noise: ThoughtNoise = NO_NOISE
    batch_size: int = 64

    def __call__(self, questions: Sequence[Sequence[int]], out: Generated) -> list[AnswerScore]:
        if self.noise and isinstance(self.model, ImplicitReward):
            return self._after_given_thoughts(self.model, questions, out)
        lm, values = self.model.lm, isinstance(self.model, ValueModel)
        completions = [
            completion_from_ids(
                lm, question, out.completion_ids(row), text=out.texts[row], mode=out.modes[row],
                num_thoughts=int(out.num_thoughts[row]) if lm.reasoning.in_mode(out.modes[row]).slot.thinks else None,
            )
            for row, question in enumerate(questions)
        ]  # fmt: skip
        parts = self.model.steps(completions, self.batch_size)
        rewards = [float(row[-1] if values else row.sum()) for row in parts]
        models = 1 if values else 2
        return [AnswerScore(r, models * each.passes) for r, each in zip(rewards, completions, strict=True)]

    def _after_given_thoughts(
        self, reward: ImplicitReward, questions: Sequence[Sequence[int]], out: Generated
    ) -> list[AnswerScore]:
        rewards: dict[int, Tensor] = {}
        for count in out.num_thoughts.unique().tolist():
            rows = (out.num_thoughts == count).nonzero()[:, 0].tolist()
            asked, written = [questions[row] for row in rows], [out.completion_ids(row) for row in rows]
            thoughts_NKD = out.thoughts[rows, :count]
            found_N = answer_rewards(reward, asked, thoughts_NKD, written, self.noise, self.batch_size)
            rewards |= zip(rows, found_N, strict=True)
        return [AnswerScore(float(rewards[row]), 2) for row in range(len(questions))]  # one pass of each model


def load_scorer(config: EvaluateConfig, lm: LatentLM, world: World) -> AnswerReward | None:
    """The reward model that an evaluation of `lm` names, with its best checkpoint; None if it names none.

    Raises ValueError if `reward` is no run of coconut reward, or if its vocabulary, prompt format, modes or slot are
    not those of `lm`.
    """
    if not config.reward:
        return None
    reference = reference_of(config.reward)
    settings, reward_lm = read_config(config.reward), load_model(config.reward, "best", config.engine, world)
    if lm.gates:
        raise ValueError(
            f"reward={config.reward}: {config.run} mixes what it expected into the words of its chain, and a reward "
            "model reads words alone. Leave reward out."
        )
    if config.rate is not None and reward_lm.reasoning.slot.max_group:
        reward_lm.reasoning = reward_lm.reasoning.at_rate(config.rate)
    ours, its = lm.reasoning, reward_lm.reasoning
    pairs = {
        "vocabularies": (lm.tokenizer.get_vocab(), reward_lm.tokenizer.get_vocab()),
        "prompt formats": (ours.format, its.format),
        "modes": (ours.modes, its.modes),
        "slots before an answer": (ours.slot, its.slot),
    }
    if different := [name for name, (a, b) in pairs.items() if a != b]:
        raise ValueError(
            f"reward={config.reward} and {config.run} have different {different[0]}. Name a reward model that was "
            f"trained from {config.run} or a run like it: coconut reward init={config.run}"
        )
    noise = ThoughtNoise(config.thought_noise, config.thought_dropout)
    if get_loss(settings["loss"]).is_value_model:
        return AnswerReward(ValueModel(reward_lm), noise, config.batch_size)
    reward = ImplicitReward(
        reward_lm, match_dtypes(LatentLM.from_pretrained(reference), reward_lm, reward_lm.device), settings["beta"]
    )
    return AnswerReward(reward, noise, config.batch_size)
