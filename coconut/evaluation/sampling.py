"""Sampled evaluation: answer every question n times, and say what k of the n answers are worth.

Answers to a question differ by sampled words (temperature, top_p), by Gaussian noise on each thought that is fed, by
dropout of its numbers, or by several of these. The random numbers of an answer are keyed by (seed, row of the question
in its file, number of the sample), so that neither the batch size nor the number of processes changes an answer, up to
the rounding of the model.

Shapes: Q questions, N answers to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.engine.world import World
from coconut.evaluation.config import Sampling
from coconut.evaluation.evaluator import EvalResult, Prediction, describe, prediction_of, summarize, writes
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import Numbers, best_at, majority_at, pass_at
from coconut.generation.config import SoftThinking
from coconut.generation.generate import Generated, longest_first, pad_rows
from coconut.generation.thoughts import StopCriterion
from coconut.methods import Reasoning
from coconut.tasks import Task

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


METRICS = ("pass", "maj", "best")  # at k


class AnswerScore(NamedTuple):
    """The reward of an answer, and the sequential forward passes that computing it takes."""

    reward: float
    passes: int


class AnswerScorer(Protocol):
    """Scores generated answers, by which the best of n is chosen. `questions`: the token ids of each answer's."""

    def __call__(self, questions: Sequence[Sequence[int]], out: Generated, /) -> list[AnswerScore]: ...


@dataclass
class AtK:
    """pass@k, maj@k and, with a reward, best@k (`metrics_at_k`).

    They are means over questions, with 95 % bootstrap intervals over questions.
    """

    k: int
    pass_at_k: float
    pass_interval: tuple[float, float]
    maj_at_k: float
    maj_interval: tuple[float, float]
    best_at_k: float | None = None
    best_interval: tuple[float, float] | None = None


@dataclass
class SamplingResult:
    """The settings of sampling and what came of all answers.

    `unreadable`: the share of answers without one that can be read. `total_passes`, `total_thoughts` and
    `total_new_tokens`: over all answers to all questions, each counted as if it were generated alone.
    `scoring_passes`: over all answers, of the reward that chooses among them; 0 without one.
    `at_k`: for k = 1, 2, 4, ... and the number of samples.
    """

    samples: int
    temperature: float
    top_p: float
    thought_noise: float
    thought_dropout: float
    seed: int
    unreadable: float
    total_passes: int
    total_thoughts: int
    total_new_tokens: int
    scoring_passes: int
    at_k: list[AtK]


@dataclass(kw_only=True)
class SampledResult(EvalResult):
    """The summary of a sampled evaluation.

    `count`: the questions. `correct`: the right answers of all. `accuracy`: their share, which is pass@1, with the
    bootstrap `interval` over questions. `seconds_per_item`: of a question with all its answers. Other means and shares
    are over all answers.
    """

    sampling: SamplingResult


@dataclass
class SampledAnswers:
    """A question, its gold answer, how many answers were right, and each answer as the fields of its Prediction.

    If answers are scored, each has a `reward` and `scoring_passes` as well.
    """

    question: str
    gold: str
    correct: int
    answers: list[dict[str, Any]]


class SampledEvaluation(NamedTuple):
    """What `evaluate_samples` gives."""

    result: SampledResult
    questions: list[SampledAnswers]


def evaluate_samples(
    lm: LatentLM, task: Task, examples: Sequence[Example], sampling: Sampling, *, rows: Sequence[int] | None = None,
    question_ids: Sequence[list[int]] | None = None, num_thoughts: int | None = None,
    stop: StopCriterion | None = None, soft_thinking: SoftThinking | None = None, mode: str | None = None,
    max_new_tokens: int | None = None, batch_size: int = 64,
    on_batch: Callable[[int, float], None] = lambda done, correct: None, world: World | None = None,
    scorer: AnswerScorer | None = None,
) -> SampledEvaluation:  # fmt: skip
    """Answer every example `sampling.samples` times, judge the answers, and summarize them.

    `rows`: the row of each example in its file, which is part of the key of its random numbers; by default its index.
    `batch_size`: answers at a time. `on_batch(questions, correct)` is called after each batch, where each question
    counts by the share of its answers that are right. `scorer`: gives each answer a reward, by which the best of k is
    chosen. The other arguments are those of `evaluate`.
    Without temperature, noise and dropout all answers are the greedy one, which is generated once.
    Raises ValueError for noise on, or dropout of, the thoughts of a model that has none.
    """
    _refuse_noise(lm.reasoning, num_thoughts, sampling)
    world, rows = world or World(), range(len(examples)) if rows is None else rows
    encoded = question_ids or encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    drawn = sampling.samples if sampling.is_random else 1
    words = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    options = {
        "num_thoughts": num_thoughts, "stop": stop, "soft_thinking": soft_thinking, "mode": mode,
        "max_new_tokens": max_new_tokens, "thought_noise": sampling.thought_noise,
        "thought_dropout": sampling.thought_dropout,
        **(words if sampling.temperature else {}),
    }  # fmt: skip
    answers: dict[int, list[Answered]] = {}
    start_time = time.perf_counter()
    own_indices = range(world.rank, len(examples), world.size)
    for positions in longest_first([encoded[i] for i in own_indices], max(1, batch_size // drawn)):
        world.set_activity("in an evaluation")
        indices = [own_indices[position] for position in positions]
        ids, mask = pad_rows([encoded[i] for i in indices], lm.special.pad)
        answers |= {i: [] for i in indices}
        for first in range(0, drawn, batch_size):
            numbers = range(first, min(first + batch_size, drawn))
            keys = [(sampling.seed, rows[i], number) for i in indices for number in numbers]
            out = lm.generate(ids, mask, num_return_sequences=len(numbers), random_keys=keys, **options)
            of_rows = [i for i in indices for _ in numbers]
            scores = scorer([encoded[i] for i in of_rows], out) if scorer else [None] * len(keys)
            reasoning = writes(lm.reasoning, soft_thinking)
            for row, (i, score) in enumerate(zip(of_rows, scores, strict=True)):
                answers[i].append(Answered(prediction_of(task, examples[i], reasoning, out, row), score))
        on_batch(len(answers), sum(_share_right(of) for of in answers.values()))
    answers = {i: of for part in world.all_gather_object(answers) for i, of in part.items()}
    seconds = time.perf_counter() - start_time
    ordered = [answers[i] * (sampling.samples // drawn) for i in range(len(examples))]
    return SampledEvaluation(
        _summary(task, examples, ordered, sampling, seconds, lm.reasoning.modes),
        [_answers_row(example, of) for example, of in zip(examples, ordered, strict=True)],
    )


def sizes_of(samples: int) -> list[int]:
    """The values of k: 1, 2, 4, ... and the number of samples."""
    return sorted({*(2**power for power in range(samples.bit_length())), samples})


def values_at(
    keys: Sequence[Sequence[Any]], right_QN: Numbers, rewards_QN: Numbers | None = None
) -> dict[str, Numbers]:
    """(Q, sizes) the value of each question by the name of the metric: pass, maj and, with rewards, best.

    keys: see `majority_at`. The sizes are those of `sizes_of`.
    """
    sizes = sizes_of(right_QN.shape[1])
    values = {
        "pass": np.stack([pass_at(right_QN, k) for k in sizes], axis=1), "maj": majority_at(keys, right_QN, sizes),
    }  # fmt: skip
    if rewards_QN is not None:
        best_QS = np.stack([best_at(rewards_QN, right_QN, k) for k in sizes], axis=1)
        values["best"] = best_QS.round(12)  # equal values stay equal, by which the bootstrap counts kinds of questions
    return values


def metrics_at(keys: Sequence[Sequence[Any]], right_QN: Numbers, rewards_QN: Numbers | None = None) -> list[AtK]:
    """pass@k, maj@k and, with rewards, best@k for the sizes of `sizes_of`. keys: see `majority_at`."""
    values = values_at(keys, right_QN, rewards_QN)
    rows = []
    for place, k in enumerate(sizes_of(right_QN.shape[1])):
        found: dict[str, Any] = {}
        for name, values_QS in values.items():
            values_Q = values_QS[:, place]
            found |= {f"{name}_at_k": float(values_Q.mean()), f"{name}_interval": mean_interval(values_Q[None])}
        rows.append(AtK(k, **found))
    return rows


def keys_of(task: Task, predicted: Sequence[str | None]) -> list[Hashable | None]:
    """The key by which the task compares each answer; None for one that cannot be read."""
    return [None if answer is None else task.key(answer) for answer in predicted]


def describe_samples(result: SampledResult) -> str:
    """The result as aligned lines of text."""
    of, (_, *shared) = result.sampling, describe(result).split("\n")
    answers = result.count * of.samples
    right = f"{100 * result.accuracy:.1f} % of them right"
    first = f"{of.samples} answer{'s' * (of.samples != 1)} to each of {result.count} questions, {right}"
    totals = f"{of.total_passes:,} forward passes, {of.total_thoughts:,} thoughts, {of.total_new_tokens:,} text tokens"
    if of.scoring_passes:
        totals += f", {of.scoring_passes:,} forward passes for rewards"
    more = [("unreadable", f"{100 * of.unreadable:.1f} %"), (f"all {answers:,}", totals)]
    table = [("k", *(f"{name}@k" for name in metrics_in(asdict(of.at_k[0]))))]
    for row in map(asdict, of.at_k):
        cells = [_with_interval(row[f"{name}_at_k"], row[f"{name}_interval"]) for name in metrics_in(row)]
        table.append((str(row["k"]), *cells))
    return "\n".join([
        f"  {'answers':<12} {first}", *shared, *(f"  {name:<12} {value}" for name, value in more),
        *("  " + f"{k:>4}  {''.join(f'{cell:<24}' for cell in cells)}".rstrip() for k, *cells in table),
    ])  # fmt: skip


def metrics_in(row: Mapping[str, Any]) -> list[str]:
    """The metrics that a row of `at_k` has."""
    return [name for name in METRICS if row.get(f"{name}_at_k") is not None]


def describe_sampling(sampling: Mapping[str, Any]) -> str:
    """A phrase with the settings of sampling, such as "temperature 0.8, noise 0.1"."""
    shown = {
        "temperature": sampling["temperature"], "top-p": sampling["top_p"] % 1, "noise": sampling["thought_noise"],
        "dropout": sampling.get("thought_dropout", 0),
    }  # fmt: skip
    return ", ".join(f"{name} {value:g}" for name, value in shown.items() if value) or "greedy"


def _with_interval(mean: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _refuse_noise(reasoning: Reasoning, num_thoughts: int | None, sampling: Sampling) -> None:
    """Raise ValueError if there are no thoughts to which noise could be added, or whose numbers could be dropped."""
    if not sampling.changes_thoughts:
        return
    name = "thought_noise" if sampling.thought_noise else "thought_dropout"
    given = f"{name}={getattr(sampling, name)}"
    if reasoning.modes or not reasoning.slot.thinks:
        why = "its modes think without noise" if reasoning.modes else "it has no latent thoughts to change"
        raise ValueError(f"{given} is not for {reasoning.method}: {why}. Set temperature instead.")
    if not (reasoning.num_thoughts if num_thoughts is None else num_thoughts):
        here = f"stage {reasoning.stage}" if num_thoughts is None else "num_thoughts=0"
        raise ValueError(f"{given}: {reasoning.method} answers without thoughts here ({here}).")


class Answered(NamedTuple):
    """An answer, and its score if there is a scorer."""

    prediction: Prediction
    score: AnswerScore | None


def _share_right(answers: Sequence[Answered]) -> float:
    return sum(answer.prediction.correct for answer in answers) / len(answers)


def _answers_row(example: Example, answers: Sequence[Answered]) -> SampledAnswers:
    rows = []
    for prediction, score in answers:
        row = {name: value for name, value in asdict(prediction).items() if name not in ("question", "gold")}
        rows.append(row | ({"reward": score.reward, "scoring_passes": score.passes} if score else {}))
    return SampledAnswers(example.question, example.answer, sum(row["correct"] for row in rows), rows)


def _summary(
    task: Task, examples: Sequence[Example], answers: Sequence[Sequence[Answered]], sampling: Sampling,
    seconds: float, modes: Sequence[str],
) -> SampledResult:  # fmt: skip
    flat = [answer.prediction for of in answers for answer in of]
    scores = [[answer.score for answer in of if answer.score] for of in answers]
    repeated = [example for example in examples for _ in range(sampling.samples)]
    right_QN = np.array([[float(answer.prediction.correct) for answer in of] for of in answers])
    keys = [keys_of(task, [answer.prediction.predicted for answer in of]) for of in answers]
    rewards_QN = np.array([[score.reward for score in of] for of in scores]) if scores[0] else None
    at_k = metrics_at(keys, right_QN, rewards_QN)
    result = SamplingResult(
        **asdict(sampling), unreadable=sum(answer.predicted is None for answer in flat) / len(flat),
        total_passes=sum(answer.passes for answer in flat), total_thoughts=sum(answer.num_thoughts for answer in flat),
        total_new_tokens=sum(answer.new_tokens for answer in flat),
        scoring_passes=sum(score.passes for of in scores for score in of), at_k=at_k,
    )  # fmt: skip
    summary = summarize(task, repeated, flat, seconds, modes)
    values = {field.name: getattr(summary, field.name) for field in fields(summary)}
    values |= {"count": len(examples), "interval": at_k[0].pass_interval, "seconds_per_item": seconds / len(examples)}
    return SampledResult(**values, sampling=result)
