"""How good an answer is, from 0 to 1. What it cost is taken from that later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut.adaptive.backends import LatentBackend, Reply
from coconut.completions.completion import Completion, completion_from_ids
from coconut.data.examples import Example
from coconut.evaluation.evaluator import answer_key
from coconut.methods import PromptFormat
from coconut.rewards.implicit import ImplicitReward
from coconut.tasks import Task
from coconut.utils.pretrained import explain_load_errors, load_pretrained

Judge = Callable[[Sequence[Example], Sequence[Reply], dict[str, Any]], Sequence[float]]
"""From examples, a reply to each, and the settings with which all were asked, to one number each."""


@dataclass(frozen=True)
class Vote:
    """Of several samples the answer that most of them give, as the task tells answers apart."""

    task: Task
    form: PromptFormat

    def tied_samples(self, reply: Reply) -> list[int]:
        """The first sample with each of the answers that have most votes; the first of all if none has an answer."""
        keys: list[Hashable | None] = [answer_key(self.task, text, self.form) for text in reply.texts]
        votes = Counter(key for key in keys if key is not None)
        most = max(votes.values(), default=0)
        return [keys.index(key) for key, count in votes.items() if count == most] or [0]

    def chosen_sample(self, reply: Reply) -> int:
        """The first sample with the answer that is taken: of tied ones the one sampled first, each equally likely."""
        return self.tied_samples(reply)[0]

    def mean_over_ties(
        self, replies: Sequence[Reply], score: Callable[[list[tuple[int, int]]], Sequence[float]]
    ) -> list[float]:
        """A score for each reply: the mean over the tied answers of what `score` says of samples, each the place of a
        reply and that of a text in it.
        """
        places = [(place, sample) for place, reply in enumerate(replies) for sample in self.tied_samples(reply)]
        found: list[list[float]] = [[] for _ in replies]
        for (place, _), value in zip(places, score(places), strict=True):
            found[place].append(value)
        return [sum(values) / len(values) for values in found]


@dataclass(frozen=True)
class ExactJudge:
    """1 for what the task judges right, 0 for the rest; where answers are tied, the share of them that is right."""

    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: Any = None) -> list[float]:
        task, form = self.vote.task, self.vote.form

        def right(place: int, sample: int) -> float:
            said = task.read_answer(replies[place].texts[sample], form)
            return float(task.judge(said, examples[place].answer))

        return self.vote.mean_over_ties(replies, lambda places: [right(*place) for place in places])


class PretrainedJudge:
    """A reward model of Hugging Face with one output: the sigmoid of what it says of question, reference and answer.

    AdaReasoner takes OpenAssistant/reward-model-deberta-v3-large-v2 (arXiv 2505.17312, section 4.1).
    """

    def __init__(self, place: str, vote: Vote, device: torch.device, batch_size: int = 64):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with explain_load_errors(place, "judge.model"):
            self.model = load_pretrained(AutoModelForSequenceClassification, place).to(device).eval()
            self.tokenizer = load_pretrained(AutoTokenizer, place)
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
        def scores(places: list[tuple[int, int]]) -> list[float]:
            asked = [f"{examples[place].question}\n{examples[place].answer}" for place, _ in places]
            said = [replies[place].texts[sample] for place, sample in places]
            found: list[float] = []
            for first in range(0, len(asked), self.batch_size):
                part = slice(first, first + self.batch_size)
                inputs = self.tokenizer(asked[part], said[part], padding=True, truncation=True, return_tensors="pt")
                found += self.model(**inputs.to(self.model.device)).logits[:, 0].float().sigmoid().tolist()
            return found

        return self.vote.mean_over_ties(replies, scores)


@dataclass(frozen=True)
class ImplicitJudge:
    """The sigmoid of the implicit reward of the answer that is taken, r(y) = beta log pi(y)/pi_ref(y). It needs no
    reference answer.
    """

    backend: LatentBackend
    reward: ImplicitReward
    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: dict[str, Any]) -> list[float]:
        rows = self.backend.rows([example.question for example in examples], settings)

        def said(place: int, taken: int) -> Completion:
            reply = replies[place]
            return completion_from_ids(
                self.backend.lm, rows[place], reply.completion_ids[taken], text=reply.texts[taken],
                mode=reply.modes[taken],
                num_thoughts=reply.num_thoughts[taken],
            )  # fmt: skip

        def scores(places: list[tuple[int, int]]) -> list[float]:
            samples = [said(*place) for place in places]
            return [float(rewards.sum().sigmoid()) for rewards in self.reward.tokens(samples)]

        return self.vote.mean_over_ties(replies, scores)


def judge_scores(
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
