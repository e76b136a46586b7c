"""Compare reward models with majority vote, Monte Carlo rollouts and the oracle: accuracy and cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from scipy.special import expit

from coconut.completions.completion import Completion
from coconut.completions.rollouts import CorrectnessReward
from coconut.evaluation.evaluator import answer_key
from coconut.evaluation.metrics_at_k import best_at, pass_at
from coconut.rewards.aggregation import (
    SUBSETS,
    aggregate_steps,
    best_threshold,
    bootstrap_interval,
    first_below,
    first_errors,
    weighted_vote,
)
from coconut.rewards.implicit import ImplicitReward
from coconut.rewards.labelled_answers import LabelledAnswers, all_completions
from coconut.rewards.losses import Loss
from coconut.rewards.monte_carlo import continue_completions, step_labels
from coconut.rewards.step_spans import step_count
from coconut.rewards.value_model import ValueModel
from coconut.runs.study import Study
from coconut.tasks.chain import read_steps

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


MORE = ("more", "more_low", "more_high")  # the difference to majority vote, and its interval


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
        return aggregate_steps(self.parts, "last") if self.values else expit(aggregate_steps(self.parts, "sum"))


def num_tokens(completions: Sequence[Completion]) -> int:
    """The tokens of completions with their prompts."""
    return sum(len(completion.layout.ids) for completion in completions)


def score_with_model(
    name: str, model: ImplicitReward | ValueModel, labelled: Sequence[LabelledAnswers], batch_size: int
) -> ScorerResult:
    begin, completions, values = time.perf_counter(), all_completions(labelled), isinstance(model, ValueModel)
    parts = [row.tolist() for row in model.steps(completions, batch_size)]
    tokens = num_tokens(completions) * (1 if values else 2)
    return ScorerResult(name, parts, time.perf_counter() - begin, tokens, values)


def score_with_rollouts(
    lm: LatentLM, judge: CorrectnessReward, labelled: Sequence[LabelledAnswers], rollouts: int, seed: int
) -> ScorerResult:
    """Monte Carlo estimates: the share of rollouts from the end of each step that come out right."""
    begin = time.perf_counter()
    labels = step_labels(lm, judge, labelled, rollouts=rollouts, seed=seed)
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
    answers = [[answer_key(judge.task, s.text, judge.form) for s in row.completions] for row in labelled]
    rows: list[dict[str, Any]] = []

    def add(scorer: str, aggregation: str, size: int, values_Q: np.ndarray) -> None:
        row: dict[str, Any] = {"scorer": scorer, "aggregation": aggregation, "n": size}
        for names, means_Q in (("accuracy", "low", "high"), values_Q), (MORE, values_Q - majority_Q):
            row |= zip(names, (float(means_Q.mean()), *bootstrap_interval(means_Q)), strict=True)
        rows.append(row)

    for size in [n for n in sizes if n <= N]:
        majority_Q = weighted_vote(answers, np.ones_like(right_QN), right_QN, size)
        add("oracle", "any right", size, pass_at(right_QN, size))
        add("majority", "vote", size, majority_Q)
        for scorer in scored:
            for aggregation in scorer.aggregations:
                scores_QN = aggregate_steps(scorer.parts, aggregation).reshape(right_QN.shape)
                add(scorer.name, aggregation, size, best_at(scores_QN, right_QN, size))
            weights_QN = scorer.weights().reshape(right_QN.shape)
            add(scorer.name, "vote", size, weighted_vote(answers, weights_QN, right_QN, size))
    scoring = {scorer.name: {"seconds": scorer.seconds, "tokens": scorer.tokens} for scorer in scored}
    facts = {"questions": len(labelled), "samples": N, "mean": float(right_QN.mean()), "draws": SUBSETS}
    return Study("selection", rows, {**facts, "scoring": scoring})


def error_localisation(
    answers: Sequence[Sequence[LabelledAnswers]], scored: Sequence[Sequence[ScorerResult]], judge: CorrectnessReward
) -> Study:
    """How well each scorer finds the first wrong step, with a threshold chosen on the development completions.

    `answers`: the development and the test completions; `scored`: for each scorer its results on both. The task has
    `first_wrong`, an exact check of steps.
    """
    task, form = cast("Any", judge.task), judge.form
    texts = [[(row.example.question, s.text) for row in part for s in row.completions] for part in answers]
    truth = [[task.first_wrong(question, read_steps(text, form)) for question, text in part] for part in texts]
    rows = []
    for results in scored:
        steps = [
            [parts[: step_count(text, form)] for parts, (_, text) in zip(result.parts, part, strict=True)]
            for result, part in zip(results, texts, strict=True)
        ]
        threshold, result = best_threshold(steps[0], truth[0]), results[1]
        measured = {"threshold": threshold, "seconds": result.seconds, "tokens": result.tokens}
        rows.append({"scorer": result.name, **first_errors(first_below(steps[1], threshold), truth[1]), **measured})
    wrong = sum(index is not None for index in truth[1])
    return Study("first_errors", rows, {"answers": len(truth[1]), "with_an_error": wrong})


@dataclass(frozen=True)
class TrainedRewardModel:
    """The training cost of a reward model. `items`: completions, or pairs, used in updates, counted with repetition."""

    name: str
    seconds: float
    items: int
    loss: Loss


def costs(
    models: Sequence[TrainedRewardModel], answers: Sequence[LabelledAnswers], parameters: int,
    rollouts: ScorerResult | None, num_rollout_answers: int,
) -> Study:  # fmt: skip
    """The cost of scoring steps: of training a reward model on the labelled `answers`, or of labelling by rollouts.

    FLOPs: 2 for each parameter and token forward, 4 more backward. A training's cost has its updates, with the forward
    passes for the reference point, and the reference model's scores, but no validation. `rollouts` were measured on
    `num_rollout_answers` completions; their cost is scaled to the number of `answers`, and does not include training on
    their labels.
    """
    completions = all_completions(answers)
    tokens = num_tokens(completions)
    rows: list[dict[str, Any]] = []
    for model in models:
        epochs = model.items * (2 if model.loss.pairs else 1) / len(completions)
        passes = (3 + model.loss.uses_reference_point) * epochs + (not model.loss.is_value_model)
        rows.append({"scorer": model.name, "seconds": model.seconds, "flops": float(2 * parameters * tokens * passes)})
    if rollouts:
        scale = len(completions) / num_rollout_answers
        flops = 2.0 * parameters * rollouts.tokens * scale
        rows.append({"scorer": rollouts.name, "seconds": rollouts.seconds * scale, "flops": flops})
    return Study("costs", rows, {"answers": len(completions), "tokens": tokens, "parameters": parameters})


def bounds(
    reward: ImplicitReward, labelled: Sequence[LabelledAnswers], *,
    continuations: int = 64, prefixes: int = 200, seed: int = 0,
) -> Study:  # fmt: skip
    """Test E_ref[r] <= q <= max r on random prefixes (arXiv 2412.01981, proposition 3.1).

    q is the value of a prefix, r the rewards of whole completions that the reference model samples after it. A row for
    each prefix: q, and of the sampled r the mean, the maximum and the soft value beta log mean exp(r / beta), which is
    q in expectation over all continuations.
    """
    rng = np.random.default_rng(seed)
    completions = [s for s in all_completions(labelled) if len(s.completion_ids) > 1]
    chosen = [completions[i] for i in rng.choice(len(completions), min(prefixes, len(completions)), replace=False)]
    cuts = [int(rng.integers(1, len(s.completion_ids))) for s in chosen]
    values = [float(row[:cut].sum()) for row, cut in zip(reward.tokens(chosen), cuts, strict=True)]
    prefixed = [s.with_completion_ids(s.completion_ids[:cut]) for s, cut in zip(chosen, cuts, strict=True)]
    sampled = continue_completions(reward.reference, prefixed, continuations, seed=seed, batch_size=32)
    rows = []
    for prefix, value, continued in zip(prefixed, values, sampled, strict=True):
        wholes = [prefix.with_completion_ids([*prefix.completion_ids, *added]) for added in continued]
        r = torch.stack([row.sum() for row in reward.tokens(wholes)]).double()
        soft_value = reward.beta * (torch.logsumexp(r / reward.beta, 0) - math.log(len(r)))
        rows.append({"q": value, "mean": float(r.mean()), "max": float(r.max()), "soft": float(soft_value)})
    return Study("bounds", rows, {"continuations": continuations, "beta": reward.beta})


def all_bounds(studies: Mapping[str, Study]) -> Study:
    """For each reward model, the share of prefixes for which each bound held.

    soft_error: the mean absolute difference of q and the sampled soft value. spread: the standard deviation of q.
    """
    rows = []
    for name, study in studies.items():
        q, mean, most, soft = (np.array([row[key] for row in study.rows]) for key in ("q", "mean", "max", "soft"))
        held = {"mean_below": float((mean <= q + 1e-6).mean()), "below_max": float((q <= most + 1e-6).mean())}
        errors = {"soft_error": float(abs(soft - q).mean()), "spread": float(q.std())}
        counts = {"prefixes": len(study.rows), "continuations": study.facts["continuations"]}
        rows.append({"scorer": name, **counts, **held, **errors})
    return Study("bounds", rows)
