"""Reward models side by side, and against votes, chance, rollouts and the oracle: what each is good for, and costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.completions.completion import Completion
from coconut.completions.rollouts import CorrectnessReward
from coconut.evaluation.evaluator import answer_key
from coconut.rewards.aggregation import (
    SUBSETS,
    any_right,
    best_of,
    best_threshold,
    first_below,
    first_errors,
    interval,
    of_steps,
    voted,
)
from coconut.rewards.implicit import ImplicitReward
from coconut.rewards.labelled_answers import LabelledAnswers
from coconut.rewards.monte_carlo import continue_completions, step_labels
from coconut.rewards.step_spans import step_count
from coconut.rewards.value_model import ValueModel
from coconut.runs.study import Study

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class ScorerResult:
    """What a scorer says of the parts of answers, in the order of the questions and of their answers.

    `seconds`, and `tokens` that went through a model, of each model that they went through. `values`: whether a part is
    said how likely the answer is to come out right after it, from 0 to 1, and not what the part adds.
    """

    name: str
    parts: list[list[float]]
    seconds: float
    tokens: int
    values: bool = False

    @property
    def aggregations(self) -> tuple[str, ...]:
        """Of making one score of those of the parts. The sum of values means nothing."""
        return ("min", "last") if self.values else ("sum", "min", "last")

    def weights(self) -> np.ndarray:
        """(answers,) of their votes, from 0 to 1."""
        return of_steps(self.parts, "last") if self.values else 1 / (1 + np.exp(-of_steps(self.parts, "sum")))


def samples_of(labelled: Sequence[LabelledAnswers]) -> list[Completion]:
    return [sample for row in labelled for sample in row.completions]


def implicit(
    name: str, reward: ImplicitReward, labelled: Sequence[LabelledAnswers], batch_size: int = 256
) -> ScorerResult:
    begin, samples = time.perf_counter(), samples_of(labelled)
    parts = [row.tolist() for row in reward.steps(samples, batch_size)]
    return ScorerResult(name, parts, time.perf_counter() - begin, 2 * sum(len(sample.layout.ids) for sample in samples))


def valued(name: str, model: ValueModel, labelled: Sequence[LabelledAnswers], batch_size: int = 256) -> ScorerResult:
    begin, samples = time.perf_counter(), samples_of(labelled)
    parts = [row.tolist() for row in model.parts(samples, batch_size)]
    tokens = sum(len(sample.layout.ids) for sample in samples)
    return ScorerResult(name, parts, time.perf_counter() - begin, tokens, values=True)


def monte_carlo(
    lm: LatentLM, judge: CorrectnessReward, labelled: Sequence[LabelledAnswers], **options: Any
) -> ScorerResult:
    """The shares of rollouts from the end of each step that come out right; `options` are those of `step_labels`."""
    begin = time.perf_counter()
    found = step_labels(lm, judge, labelled, **options)
    parts = [shares or [1.0] for shares in found.shares]
    return ScorerResult("rollouts", parts, time.perf_counter() - begin, found.tokens, values=True)


def selections(
    labelled: Sequence[LabelledAnswers], scored: Sequence[ScorerResult], judge: CorrectnessReward, sizes: Sequence[int]
) -> Study:
    """How often the answer that each scorer takes of n is right, for each number n of samples, with 95 % intervals.

    `more`: than the majority's on the same questions.
    Raises ValueError unless every question has as many answers as the others.
    """
    counts = {len(row.completions) for row in labelled}
    if len(counts) != 1:
        raise ValueError(f"Some questions have {min(counts)} answers and some {max(counts)}; all must have as many.")
    [N] = counts
    right_QN = np.array([row.correct for row in labelled], float)
    answers = [[answer_key(judge.task, sample.text, judge.form) for sample in row.completions] for row in labelled]
    rows: list[dict[str, Any]] = []

    def add(scorer: str, way: str, size: int, values_Q: np.ndarray) -> None:
        low, high = interval(values_Q)
        found = {"accuracy": float(values_Q.mean()), "low": low, "high": high}
        more_low, more_high = interval(values_Q - majority_Q)
        more = {"more": float((values_Q - majority_Q).mean()), "more_low": more_low, "more_high": more_high}
        rows.append({"scorer": scorer, "way": way, "n": size, **found, **more})

    for size in [n for n in sizes if n <= N]:
        majority_Q = voted(answers, np.ones_like(right_QN), right_QN, size)
        add("oracle", "any right", size, any_right(right_QN, size))
        add("majority", "vote", size, majority_Q)
        for scorer in scored:
            for way in scorer.aggregations:
                scores_QN = of_steps(scorer.parts, way).reshape(right_QN.shape)
                add(scorer.name, way, size, best_of(scores_QN, right_QN, size))
            weights_QN = scorer.weights().reshape(right_QN.shape)
            add(scorer.name, "vote", size, voted(answers, weights_QN, right_QN, size))
    scoring = {scorer.name: {"seconds": scorer.seconds, "tokens": scorer.tokens} for scorer in scored}
    facts = {"questions": len(labelled), "samples": N, "mean": float(right_QN.mean()), "draws": SUBSETS}
    return Study("selection", rows, {**facts, "scoring": scoring})


def localisation(
    development: Sequence[LabelledAnswers],
    asked: Sequence[LabelledAnswers],
    scored: Sequence[tuple[ScorerResult, ScorerResult]],
    judge: CorrectnessReward,
) -> Study:
    """How well each scorer finds the first wrong step, by a threshold that the development answers choose.

    `scored`: of the development answers and of the others. Raises ValueError for a task that cannot check steps.
    """
    check = getattr(judge.task, "first_wrong", None)
    if check is None:
        raise ValueError(f"{judge.task.name} has no exact check of steps: nothing says where the first error is.")
    form, read = judge.form, judge.task.read_steps
    told = [[(row.example.question, s.text) for row in part for s in row.completions] for part in (development, asked)]
    truth = [[check(asks, read(text, form)) for asks, text in part] for part in told]
    rows = []
    for pair in scored:
        steps = [
            [parts[: step_count(text, form)] for parts, (_, text) in zip(one.parts, part, strict=True)]
            for one, part in zip(pair, told, strict=True)
        ]
        threshold = best_threshold(steps[0], truth[0])
        found, its = first_errors(first_below(steps[1], threshold), truth[1]), pair[1]
        rows.append(
            {
                "scorer": its.name,
                "f1": found.f1,
                "of_wrong": found.wrong,
                "of_right": found.right,
                "threshold": threshold,
                "seconds": its.seconds,
                "tokens": its.tokens,
            }
        )
    wrong = sum(place is not None for place in truth[1])
    return Study("first_errors", rows, {"answers": len(truth[1]), "with_an_error": wrong})


@dataclass(frozen=True)
class TrainedRewardModel:
    """A reward model's training: the answers that it was updated with, counted as often as they were.

    `compared`: with a reference, that was asked once about all of them. `shifted`: by the mean reward of each update,
    for which its answers go forward once more.
    """

    name: str
    seconds: float
    answers: int
    compared: bool
    shifted: bool


def costs(
    models: Sequence[TrainedRewardModel],
    answers: Sequence[LabelledAnswers],
    parameters: int,
    rollouts: ScorerResult | None,
    of: int,
) -> Study:
    """What it takes to know of steps what the labels of so many answers say: a training, or rollouts for labels.

    FLOPs: 2 for each parameter and token forward, 4 more backward; of a training its updates, with what they are
    shifted by, and what its reference says of the answers, but no validation. `rollouts` are of `of` answers; their
    cost is scaled to as many as were trained on, and the training on their labels, which is to come, is not in it.
    """
    samples = samples_of(answers)
    tokens = sum(len(sample.layout.ids) for sample in samples)
    rows: list[dict[str, Any]] = [
        {
            "scorer": model.name,
            "seconds": model.seconds,
            "flops": float(
                2 * parameters * tokens * ((3 + model.shifted) * model.answers / len(samples) + model.compared)
            ),
        }
        for model in models
    ]
    if rollouts:
        scale = len(samples) / of
        flops = 2.0 * parameters * rollouts.tokens * scale
        rows.append({"scorer": rollouts.name, "seconds": rollouts.seconds * scale, "flops": flops})
    return Study("costs", rows, {"answers": len(samples), "tokens": tokens, "parameters": parameters})


def bounds(
    reward: ImplicitReward,
    labelled: Sequence[LabelledAnswers],
    *,
    continuations: int = 64,
    prefixes: int = 200,
    seed: int = 0,
) -> Study:
    """Whether E_ref[r] <= q <= max r, where q is the value of a prefix and r are the rewards of whole answers that the
    reference gives after it (arXiv 2412.01981, proposition 3.1).

    A row for each of so many prefixes, cut at random: q, and of the sampled r the mean, the maximum, and
    beta log mean exp(r / beta), which over all continuations is q itself.
    """
    draw = np.random.default_rng(seed)
    samples = [sample for sample in samples_of(labelled) if len(sample.completion_ids) > 1]
    chosen = [samples[i] for i in draw.choice(len(samples), min(prefixes, len(samples)), replace=False)]
    cuts = [int(draw.integers(1, len(sample.completion_ids))) for sample in chosen]
    values = [float(row[:cut].sum()) for row, cut in zip(reward.tokens(chosen), cuts, strict=True)]
    begun = [sample.saying(sample.completion_ids[:cut]) for sample, cut in zip(chosen, cuts, strict=True)]
    found = continue_completions(reward.reference, begun, continuations, seed=seed, batch_size=32)
    rows = []
    for sample, value, several in zip(begun, values, found, strict=True):
        whole = [sample.saying([*sample.completion_ids, *more]) for more in several]
        r = torch.stack([row.sum() for row in reward.tokens(whole)]).double()
        soft = reward.beta * (torch.logsumexp(r / reward.beta, 0) - math.log(len(r)))
        rows.append({"q": value, "mean": float(r.mean()), "max": float(r.max()), "soft": float(soft)})
    return Study("bounds", rows, {"continuations": continuations, "beta": reward.beta})


def all_bounds(studies: Mapping[str, Study]) -> Study:
    """Of each reward model the share of prefixes for which each bound held.

    `soft_error`: how far q was from its sampled estimate, in the mean; `spread`: the standard deviation of q.
    """
    rows = [
        {
            "scorer": name,
            "prefixes": len(study.rows),
            "continuations": study.facts["continuations"],
            "mean_below": float(np.mean([row["mean"] <= row["q"] + 1e-6 for row in study.rows])),
            "below_max": float(np.mean([row["q"] <= row["max"] + 1e-6 for row in study.rows])),
            "soft_error": float(np.mean([abs(row["soft"] - row["q"]) for row in study.rows])),
            "spread": float(np.std([row["q"] for row in study.rows])),
        }
        for name, study in studies.items()
    ]
    return Study("bounds", rows)


def first_answers(labelled: Sequence[LabelledAnswers], questions: int, answers: int = 8) -> list[LabelledAnswers]:
    """The first answers to each of the first questions."""
    return [
        replace(row, completions=row.completions[:answers], correct=row.correct[:answers])
        for row in labelled[:questions]
    ]
