"""Compare reward models with majority vote, Monte Carlo rollouts and the oracle: accuracy and cost."""

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
    aggregate_steps,
    best_of,
    best_threshold,
    bootstrap_interval,
    first_below,
    first_errors,
    pass_at,
    weighted_vote,
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
    """Scores of the parts (steps and answer) of completions, ordered by question.

    seconds: wall time. tokens: those forwarded, counted once for each model.
    values: whether a score is the probability that the completion comes out right after the part, and not the part's
        own reward.
    """

    name: str
    parts: list[list[float]]
    seconds: float
    tokens: int
    values: bool = False

    @property
    def aggregations(self) -> tuple[str, ...]:
        """The ways to make one score from those of the parts. Values, which are probabilities, are not summed."""
        return ("min", "last") if self.values else ("sum", "min", "last")

    def weights(self) -> np.ndarray:
        """(completions,) weights of their votes, in [0, 1]."""
        return (
            aggregate_steps(self.parts, "last")
            if self.values
            else 1 / (1 + np.exp(-aggregate_steps(self.parts, "sum")))
        )


def all_completions(labelled: Sequence[LabelledAnswers]) -> list[Completion]:
    return [completion for row in labelled for completion in row.completions]


def score_with_implicit_reward(
    name: str, reward: ImplicitReward, labelled: Sequence[LabelledAnswers], batch_size: int = 256
) -> ScorerResult:
    begin, completions = time.perf_counter(), all_completions(labelled)
    parts = [row.tolist() for row in reward.steps(completions, batch_size)]
    return ScorerResult(
        name, parts, time.perf_counter() - begin, 2 * sum(len(completion.layout.ids) for completion in completions)
    )


def score_with_value_model(
    name: str, model: ValueModel, labelled: Sequence[LabelledAnswers], batch_size: int = 256
) -> ScorerResult:
    begin, completions = time.perf_counter(), all_completions(labelled)
    parts = [row.tolist() for row in model.parts(completions, batch_size)]
    tokens = sum(len(completion.layout.ids) for completion in completions)
    return ScorerResult(name, parts, time.perf_counter() - begin, tokens, values=True)


def score_with_rollouts(
    lm: LatentLM, judge: CorrectnessReward, labelled: Sequence[LabelledAnswers], **options: Any
) -> ScorerResult:
    """Monte Carlo estimates: the share of rollouts from the end of each step that come out right.

    `options` are those of `step_labels`.
    """
    begin = time.perf_counter()
    labels = step_labels(lm, judge, labelled, **options)
    parts = [shares or [1.0] for shares in labels.shares]
    return ScorerResult("rollouts", parts, time.perf_counter() - begin, labels.tokens, values=True)


def selections(
    labelled: Sequence[LabelledAnswers], scored: Sequence[ScorerResult], judge: CorrectnessReward, sizes: Sequence[int]
) -> Study:
    """Accuracy of each scorer's choice among n completions, for each n in `sizes`, with 95 % intervals over questions.

    `more`: the difference to majority vote on the same questions.
    Raises ValueError unless all questions have the same number of completions.
    """
    counts = {len(row.completions) for row in labelled}
    if len(counts) != 1:
        raise ValueError(
            f"Some questions have {min(counts)} completions and some {max(counts)}; all must have the same number."
        )
    [N] = counts
    right_QN = np.array([row.correct for row in labelled], float)
    answers = [
        [answer_key(judge.task, completion.text, judge.form) for completion in row.completions] for row in labelled
    ]
    rows: list[dict[str, Any]] = []

    def add(scorer: str, aggregation: str, size: int, values_Q: np.ndarray) -> None:
        low, high = bootstrap_interval(values_Q)
        accuracy = {"accuracy": float(values_Q.mean()), "low": low, "high": high}
        more_low, more_high = bootstrap_interval(values_Q - majority_Q)
        more = {"more": float((values_Q - majority_Q).mean()), "more_low": more_low, "more_high": more_high}
        rows.append({"scorer": scorer, "aggregation": aggregation, "n": size, **accuracy, **more})

    for size in [n for n in sizes if n <= N]:
        majority_Q = weighted_vote(answers, np.ones_like(right_QN), right_QN, size)
        add("oracle", "any right", size, pass_at(right_QN, size))
        add("majority", "vote", size, majority_Q)
        for scorer in scored:
            for aggregation in scorer.aggregations:
                scores_QN = aggregate_steps(scorer.parts, aggregation).reshape(right_QN.shape)
                add(scorer.name, aggregation, size, best_of(scores_QN, right_QN, size))
            weights_QN = scorer.weights().reshape(right_QN.shape)
            add(scorer.name, "vote", size, weighted_vote(answers, weights_QN, right_QN, size))
    scoring = {scorer.name: {"seconds": scorer.seconds, "tokens": scorer.tokens} for scorer in scored}
    facts = {"questions": len(labelled), "samples": N, "mean": float(right_QN.mean()), "draws": SUBSETS}
    return Study("selection", rows, {**facts, "scoring": scoring})


def error_localisation(
    development: Sequence[LabelledAnswers],
    test: Sequence[LabelledAnswers],
    scored: Sequence[tuple[ScorerResult, ScorerResult]],
    judge: CorrectnessReward,
) -> Study:
    """How well each scorer finds the first wrong step, with a threshold chosen on the development completions.

    `scored`: for each scorer its results on the development and on the test completions. Raises ValueError for a task
    that cannot check steps.
    """
    check = getattr(judge.task, "first_wrong", None)
    if check is None:
        raise ValueError(f"The task {judge.task.name} has no exact check of steps, so the first error is not known.")
    form, read = judge.form, judge.task.read_steps
    texts = [[(row.example.question, s.text) for row in part for s in row.completions] for part in (development, test)]
    truth = [[check(question, read(text, form)) for question, text in part] for part in texts]
    rows = []
    for results in scored:
        steps = [
            [parts[: step_count(text, form)] for parts, (_, text) in zip(result.parts, part, strict=True)]
            for result, part in zip(results, texts, strict=True)
        ]
        threshold = best_threshold(steps[0], truth[0])
        result, test_result = first_errors(first_below(steps[1], threshold), truth[1]), results[1]
        rows.append(
            {
                "scorer": test_result.name,
                "f1": result.f1,
                "of_wrong": result.wrong,
                "of_right": result.right,
                "threshold": threshold,
                "seconds": test_result.seconds,
                "tokens": test_result.tokens,
            }
        )
    wrong = sum(index is not None for index in truth[1])
    return Study("first_errors", rows, {"answers": len(truth[1]), "with_an_error": wrong})


@dataclass(frozen=True)
class TrainedRewardModel:
    """The training cost of a reward model. `answers`: completions used in updates, counted with repetition.

    uses_reference: a reference model scored all of them once.
    uses_reference_point: the completions of each update were forwarded once more, for its mean reward (KTO).
    """

    name: str
    seconds: float
    answers: int
    uses_reference: bool
    uses_reference_point: bool


def costs(
    models: Sequence[TrainedRewardModel],
    answers: Sequence[LabelledAnswers],
    parameters: int,
    rollouts: ScorerResult | None,
    num_rollout_answers: int,
) -> Study:
    """The cost of scoring steps: of training a reward model on the labelled `answers`, or of labelling by rollouts.

    FLOPs: 2 for each parameter and token forward, 4 more backward. A training's cost has its updates, with the forward
    passes for the reference point, and the reference model's scores, but no validation. `rollouts` were measured on
    `num_rollout_answers` completions; their cost is scaled to the number of `answers`, and does not include training on
    their labels.
    """
    completions = all_completions(answers)
    tokens = sum(len(completion.layout.ids) for completion in completions)
    rows: list[dict[str, Any]] = [
        {
            "scorer": model.name,
            "seconds": model.seconds,
            "flops": float(
                2
                * parameters
                * tokens
                * ((3 + model.uses_reference_point) * model.answers / len(completions) + model.uses_reference)
            ),
        }
        for model in models
    ]
    if rollouts:
        scale = len(completions) / num_rollout_answers
        flops = 2.0 * parameters * rollouts.tokens * scale
        rows.append({"scorer": rollouts.name, "seconds": rollouts.seconds * scale, "flops": flops})
    return Study("costs", rows, {"answers": len(completions), "tokens": tokens, "parameters": parameters})


def bounds(
    reward: ImplicitReward,
    labelled: Sequence[LabelledAnswers],
    *,
    continuations: int = 64,
    prefixes: int = 200,
    seed: int = 0,
) -> Study:
    """Test E_ref[r] <= q <= max r on random prefixes (arXiv 2412.01981, proposition 3.1).

    q is the value of a prefix, r the rewards of whole completions that the reference model samples after it. A row for
    each prefix: q, and of the sampled r the mean, the maximum and the soft value beta log mean exp(r / beta), which is
    q in expectation over all continuations.
    """
    rng = np.random.default_rng(seed)
    completions = [completion for completion in all_completions(labelled) if len(completion.completion_ids) > 1]
    chosen = [completions[i] for i in rng.choice(len(completions), min(prefixes, len(completions)), replace=False)]
    cuts = [int(rng.integers(1, len(completion.completion_ids))) for completion in chosen]
    values = [float(row[:cut].sum()) for row, cut in zip(reward.tokens(chosen), cuts, strict=True)]
    prefixed = [
        completion.with_completion_ids(completion.completion_ids[:cut])
        for completion, cut in zip(chosen, cuts, strict=True)
    ]
    sampled = continue_completions(reward.reference, prefixed, continuations, seed=seed, batch_size=32)
    rows = []
    for completion, value, continuations_of_prefix in zip(prefixed, values, sampled, strict=True):
        wholes = [
            completion.with_completion_ids([*completion.completion_ids, *more]) for more in continuations_of_prefix
        ]
        r = torch.stack([row.sum() for row in reward.tokens(wholes)]).double()
        soft_value = reward.beta * (torch.logsumexp(r / reward.beta, 0) - math.log(len(r)))
        rows.append({"q": value, "mean": float(r.mean()), "max": float(r.max()), "soft": float(soft_value)})
    return Study("bounds", rows, {"continuations": continuations, "beta": reward.beta})


def all_bounds(studies: Mapping[str, Study]) -> Study:
    """For each reward model, the share of prefixes for which each bound held.

    soft_error: the mean absolute difference of q and the sampled soft value. spread: the standard deviation of q.
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
    """The first `answers` completions of each of the first `questions`."""
    return [
        replace(row, completions=row.completions[:answers], correct=row.correct[:answers])
        for row in labelled[:questions]
    ]
