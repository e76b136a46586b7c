"""How good an answer is, from 0 to 1. What it cost is taken from that later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut.adaptive.backends import Latent, Reply
from coconut.data import Example
from coconut.methods import PromptFormat
from coconut.opening import opened, reaching
from coconut.rewards.implicit import ImplicitReward
from coconut.rl.policy import sample_said
from coconut.tasks import Task

Judge = Callable[[Sequence[Example], Sequence[Reply], dict[str, Any]], Sequence[float]]
"""From examples, a reply to each, and the settings with which all were asked, to one number each."""


@dataclass(frozen=True)
class Vote:
    """Of several samples the answer that most of them give, as the task tells answers apart; the first of equally
    frequent ones.
    """

    task: Task
    form: PromptFormat

    def answers(self, reply: Reply) -> list[str | None]:
        return [self.task.read_answer(text, self.form) for text in reply.texts]

    def taken(self, reply: Reply) -> int:
        """The first sample with the answer that is taken."""
        votes: dict[int, int] = {}  # for the first sample with each answer
        found = self.answers(reply)
        for answer in found:
            if answer is not None:
                first = next((i for i in votes if self.task.judge(answer, str(found[i]))), found.index(answer))
                votes[first] = votes.get(first, 0) + 1
        return max(votes, key=lambda i: votes[i]) if votes else 0


@dataclass(frozen=True)
class Exact:
    """1 for what the task judges right, 0 for the rest."""

    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: Any = None) -> list[float]:
        task = self.vote.task
        said = [self.vote.answers(reply)[self.vote.taken(reply)] for reply in replies]
        return [float(task.judge(answer, example.answer)) for answer, example in zip(said, examples, strict=True)]


class Pretrained:
    """A reward model of Hugging Face with one output: the sigmoid of what it says of question, reference and answer.

    AdaReasoner takes OpenAssistant/reward-model-deberta-v3-large-v2 (arXiv 2505.17312, section 4.1).
    """

    def __init__(self, place: str, vote: Vote, device: torch.device, batch_size: int = 64):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with reaching(place, "judge.place"):
            self.model = opened(AutoModelForSequenceClassification, place).to(device).eval()
            self.tokenizer = opened(AutoTokenizer, place)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"{place} has {self.model.config.num_labels} outputs; a judge has one, how good an answer is."
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.vote, self.batch_size = vote, batch_size

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: Any = None) -> list[float]:
        asked = [f"{example.question}\n{example.answer}" for example in examples]
        said = [reply.texts[self.vote.taken(reply)] for reply in replies]
        scores: list[float] = []
        for first in range(0, len(asked), self.batch_size):
            part = slice(first, first + self.batch_size)
            inputs = self.tokenizer(asked[part], said[part], padding=True, truncation=True, return_tensors="pt")
            scores += self.model(**inputs.to(self.model.device)).logits[:, 0].float().sigmoid().tolist()
        return scores


@dataclass(frozen=True)
class Implicit:
    """The sigmoid of the implicit reward of the answer that is taken, r(y) = beta log pi(y)/pi_ref(y). It needs no
    reference answer.
    """

    backend: Latent
    reward: ImplicitReward
    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: dict[str, Any]) -> list[float]:
        rows = self.backend.rows([example.question for example in examples], settings)
        samples = []
        for row, reply in zip(rows, replies, strict=True):
            taken = self.vote.taken(reply)
            samples.append(
                sample_said(self.backend.lm, row, reply.said[taken], text=reply.texts[taken], mode=reply.modes[taken],
                            num_thoughts=reply.num_thoughts[taken])
            )  # fmt: skip
        return [float(rewards.sum().sigmoid()) for rewards in self.reward.tokens(samples)]


def judged(
    judge: Judge, examples: Sequence[Example], replies: Sequence[Reply], settings: dict[str, Any]
) -> list[float]:
    """What the judge says. Raises ValueError that names the answer if a score is not in [0, 1]."""
    scores = [float(score) for score in judge(examples, replies, settings)]
    for example, reply, score in zip(examples, replies, scores, strict=True):
        if not 0 <= score <= 1:
            raise ValueError(
                f"The judge gave {score} to {' / '.join(reply.texts)!r}, an answer to {example.question!r}; "
                "a score is in [0, 1]."
            )
    return scores
