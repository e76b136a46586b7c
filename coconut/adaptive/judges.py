"""Judges: scores of answers in [0, 1]. The cost of passes is subtracted later, by `OutcomeTable.rewards`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from coconut.adaptive.backends import LatentBackend, Reply
from coconut.completions.completion import completion_from_ids
from coconut.data.examples import Example
from coconut.evaluation.evaluator import answer_key
from coconut.methods import PromptFormat
from coconut.rewards.implicit import ImplicitReward
from coconut.tasks import Task
from coconut.tasks.chain import read_answer
from coconut.utils.pretrained import explain_load_errors, load_pretrained

Judge = Callable[[Sequence[Example], Sequence[Reply], dict[str, Any]], Sequence[float]]
"""From examples, a reply to each, and the settings of all replies, to one score each."""


@dataclass(frozen=True)
class Vote:
    """Majority vote among samples; the task decides which answers are equal."""

    task: Task
    form: PromptFormat

    def tied_samples(self, reply: Reply) -> list[int]:
        """For each answer with the most votes, the index of its first sample; [0] if no sample has an answer."""
        keys: list[Hashable | None] = [answer_key(self.task, text, self.form) for text in reply.texts]
        votes = Counter(key for key in keys if key is not None)
        most = max(votes.values(), default=0)
        return [keys.index(key) for key, count in votes.items() if count == most] or [0]

    def chosen_sample(self, reply: Reply) -> int:
        """The index of the chosen sample: of tied answers the one sampled first, which is equally likely to be each."""
        return self.tied_samples(reply)[0]

    def mean_over_ties(
        self, replies: Sequence[Reply], score: Callable[[list[tuple[int, int]]], Sequence[float]]
    ) -> list[float]:
        """A score for each reply: the mean over its tied answers. `score` scores pairs (index of reply, of text)."""
        pairs = [(index, sample) for index, reply in enumerate(replies) for sample in self.tied_samples(reply)]
        values_of: list[list[float]] = [[] for _ in replies]
        for (index, _), value in zip(pairs, score(pairs), strict=True):
            values_of[index].append(value)
        return [sum(values) / len(values) for values in values_of]


@dataclass(frozen=True)
class ExactJudge:
    """The task's own judge: 1 for a right answer, 0 for a wrong one; the share that is right among tied answers."""

    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: Any = None) -> list[float]:
        task, form = self.vote.task, self.vote.form

        def scores(pairs: list[tuple[int, int]]) -> list[float]:
            answers = [(read_answer(replies[i].texts[sample], form), examples[i].answer) for i, sample in pairs]
            return [float(task.judge(*pair)) for pair in answers]

        return self.vote.mean_over_ties(replies, scores)


class PretrainedJudge:
    """A Hugging Face reward model with one output: the sigmoid of its score of question, gold answer and answer.

    AdaReasoner takes OpenAssistant/reward-model-deberta-v3-large-v2 (arXiv 2505.17312, section 4.1).
    """

    def __init__(self, model_name: str, vote: Vote, device: torch.device, batch_size: int = 64):
        with explain_load_errors(model_name, "judge.model"):
            self.model = load_pretrained(AutoModelForSequenceClassification, model_name).to(device).eval()
            self.tokenizer = load_pretrained(AutoTokenizer, model_name)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"{model_name} has {self.model.config.num_labels} outputs; a judge must have one, the answer's score. "
                "Name another judge.model."
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.vote, self.batch_size = vote, batch_size

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: Any = None) -> list[float]:
        def scores(pairs: list[tuple[int, int]]) -> list[float]:
            references = [f"{examples[index].question}\n{examples[index].answer}" for index, _ in pairs]
            texts = [replies[index].texts[sample] for index, sample in pairs]
            values: list[float] = []
            for first in range(0, len(references), self.batch_size):
                part = slice(first, first + self.batch_size)
                pairs_of_texts = references[part], texts[part]
                inputs = self.tokenizer(*pairs_of_texts, padding=True, truncation=True, return_tensors="pt")
                values += self.model(**inputs.to(self.model.device)).logits[:, 0].float().sigmoid().tolist()
            return values

        return self.vote.mean_over_ties(replies, scores)


@dataclass(frozen=True)
class ImplicitJudge:
    """The sigmoid of the chosen answer's implicit reward, r(y) = beta log pi(y)/pi_ref(y). Needs no gold answer."""

    backend: LatentBackend
    reward: ImplicitReward
    vote: Vote

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply], settings: dict[str, Any]) -> list[float]:
        lm, rows = self.backend.lm, self.backend.rows([example.question for example in examples], settings)

        def scores(pairs: list[tuple[int, int]]) -> list[float]:
            samples = [
                completion_from_ids(lm, rows[i], reply.completion_ids[sample], text=reply.texts[sample],
                                    mode=reply.modes[sample], num_thoughts=reply.num_thoughts[sample])
                for i, sample, reply in ((i, sample, replies[i]) for i, sample in pairs)
            ]  # fmt: skip
            return [float(rewards.sum().sigmoid()) for rewards in self.reward.tokens(samples)]

        return self.vote.mean_over_ties(replies, scores)


def judge_scores(
    judge: Judge, examples: Sequence[Example], replies: Sequence[Reply], settings: dict[str, Any]
) -> list[float]:
    """The judge's scores. Raises ValueError, which names the answer, for a score outside [0, 1]."""
    scores = [float(score) for score in judge(examples, replies, settings)]
    for example, reply, score in zip(examples, replies, scores, strict=True):
        if not 0 <= score <= 1:
            raise ValueError(
                f"The judge gave {score} to {' / '.join(reply.texts)!r}, an answer to {example.question!r}; "
                "a score must be in [0, 1]."
            )
    return scores
