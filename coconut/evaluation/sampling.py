"""Sampled evaluation: answer every question n times, and say what k of the n answers are worth.

Answers to a question differ by sampled words (temperature, top_p), by Gaussian noise on each thought that is fed, or by
both. The random numbers of an answer are keyed by (seed, row of the question in its file, number of the sample), so
that neither the batch size nor the number of processes changes an answer, up to the rounding of the model.

Shapes: Q questions, N answers to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.engine.world import World
from coconut.evaluation.config import Sampling
from coconut.evaluation.evaluator import EvalResult, Prediction, describe, prediction_of, summarize, writes
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import Numbers, majority_at, pass_at
from coconut.generation.config import SoftThinking
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import StopCriterion
from coconut.methods import Reasoning
from coconut.tasks import Task

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class AtK:
    """pass@k and maj@k (`metrics_at_k`), means over questions, with 95 % bootstrap intervals over questions."""

    k: int
    pass_at_k: float
    pass_interval: tuple[float, float]
    maj_at_k: float
    maj_interval: tuple[float, float]


@dataclass
class SamplingResult:
    """The settings of sampling and what came of all answers.

    `unreadable`: the share of answers without one that can be read. `total_passes`, `total_thoughts` and
    `total_new_tokens`: over all answers to all questions, each counted as if it were generated alone.
    `at_k`: for k = 1, 2, 4, ... and the number of samples.
    """

    samples: int
    temperature: float
    top_p: float
    thought_noise: float
    seed: int
    unreadable: float
    total_passes: int
    total_thoughts: int
    total_new_tokens: int
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
    """A question, its gold answer, how many answers were right, and each answer as the fields of its Prediction."""

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
) -> SampledEvaluation:  # fmt: skip
    """Answer every example `sampling.samples` times, judge the answers, and summarize them.

    `rows`: the row of each example in its file, which is part of the key of its random numbers; by default its index.
    `batch_size`: answers at a time. `on_batch(questions, correct)` is called after each batch, where each question
    counts by the share of its answers that are right. The other arguments are those of `evaluate`.
    Without temperature and noise all answers are the greedy one, which is generated once.
    Raises ValueError for noise on the thoughts of a model that has none.
    """
    _refuse_noise(lm.reasoning, num_thoughts, sampling.thought_noise)
    world, rows = world or World(), range(len(examples)) if rows is None else rows
    encoded = question_ids or encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    drawn = sampling.samples if sampling.is_random else 1
    words = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    options = {
        "num_thoughts": num_thoughts, "stop": stop, "soft_thinking": soft_thinking, "mode": mode,
        "max_new_tokens": max_new_tokens, "thought_noise": sampling.thought_noise,
        **(words if sampling.temperature else {}),
    }  # fmt: skip
    answers: dict[int, list[Prediction]] = {}
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
            for row in range(len(keys)):
                i = indices[row // len(numbers)]
                answers[i].append(prediction_of(task, examples[i], writes(lm.reasoning, soft_thinking), out, row))
        on_batch(len(answers), sum(_share_right(of) for of in answers.values()))
    answers = {i: of for part in world.all_gather_object(answers) for i, of in part.items()}
    seconds = time.perf_counter() - start_time
    ordered = [answers[i] * (sampling.samples // drawn) for i in range(len(examples))]
    return SampledEvaluation(
        _summary(task, examples, ordered, sampling, seconds, lm.reasoning.modes),
        [_answers_row(example, of) for example, of in zip(examples, ordered, strict=True)],
    )


def metrics_at(keys: Sequence[Sequence[Any]], right_QN: Numbers) -> list[AtK]:
    """pass@k and maj@k for k = 1, 2, 4, ... and N. keys: see `majority_at`."""
    N = right_QN.shape[1]
    sizes = sorted({*(2**power for power in range(N.bit_length())), N})
    passed_QS = np.stack([pass_at(right_QN, k) for k in sizes], axis=1)
    elected_QS = majority_at(keys, right_QN, sizes)
    return [
        AtK(k, float(passed_Q.mean()), mean_interval(passed_Q[None]),
            float(elected_Q.mean()), mean_interval(elected_Q[None]))
        for k, passed_Q, elected_Q in zip(sizes, passed_QS.T, elected_QS.T, strict=True)
    ]  # fmt: skip


def describe_samples(result: SampledResult) -> str:
    """The result as aligned lines of text."""
    of, (_, *shared) = result.sampling, describe(result).split("\n")
    answers = result.count * of.samples
    first = f"{of.samples} answers to each of {result.count} questions, {100 * result.accuracy:.1f} % of them right"
    totals = f"{of.total_passes:,} forward passes, {of.total_thoughts:,} thoughts, {of.total_new_tokens:,} text tokens"
    more = [("unreadable", f"{100 * of.unreadable:.1f} %"), (f"all {answers:,}", totals)]
    table = [("k", "pass@k", "maj@k")]
    for row in of.at_k:
        passed, elected = (
            _with_interval(row.pass_at_k, row.pass_interval),
            _with_interval(row.maj_at_k, row.maj_interval),
        )
        table.append((str(row.k), passed, elected))
    return "\n".join([
        f"  {'answers':<12} {first}", *shared, *(f"  {name:<12} {value}" for name, value in more),
        *(f"  {k:>4}  {passed:<24}{elected}" for k, passed, elected in table),
    ])  # fmt: skip


def _with_interval(mean: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _refuse_noise(reasoning: Reasoning, num_thoughts: int | None, noise: float) -> None:
    """Raise ValueError if there are no thoughts that noise could be added to."""
    if not noise:
        return
    if reasoning.modes or not reasoning.slot.thinks:
        why = "its modes think without noise" if reasoning.modes else "it has no latent thoughts to make noisy"
        raise ValueError(f"thought_noise={noise} is not for {reasoning.method}: {why}. Set temperature instead.")
    if not (reasoning.num_thoughts if num_thoughts is None else num_thoughts):
        given = f"stage {reasoning.stage}" if num_thoughts is None else "num_thoughts=0"
        raise ValueError(f"thought_noise={noise}: {reasoning.method} answers without thoughts here ({given}).")


def _share_right(answers: Sequence[Prediction]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _answers_row(example: Example, answers: Sequence[Prediction]) -> SampledAnswers:
    rows = [asdict(answer) for answer in answers]
    own = [{name: value for name, value in row.items() if name not in ("question", "gold")} for row in rows]
    return SampledAnswers(example.question, example.answer, sum(answer.correct for answer in answers), own)


def _summary(
    task: Task, examples: Sequence[Example], answers: Sequence[Sequence[Prediction]], sampling: Sampling,
    seconds: float, modes: Sequence[str],
) -> SampledResult:  # fmt: skip
    flat = [answer for of in answers for answer in of]
    repeated = [example for example in examples for _ in range(sampling.samples)]
    right_QN = np.array([[float(answer.correct) for answer in of] for of in answers])
    keys = [[None if one.predicted is None else task.key(one.predicted) for one in of] for of in answers]
    at_k = metrics_at(keys, right_QN)
    result = SamplingResult(
        **asdict(sampling), unreadable=sum(answer.predicted is None for answer in flat) / len(flat),
        total_passes=sum(answer.passes for answer in flat), total_thoughts=sum(answer.num_thoughts for answer in flat),
        total_new_tokens=sum(answer.new_tokens for answer in flat), at_k=at_k,
    )  # fmt: skip
    summary = summarize(task, repeated, flat, seconds, modes)
    values = {field.name: getattr(summary, field.name) for field in fields(summary)}
    values |= {"count": len(examples), "interval": at_k[0].pass_interval, "seconds_per_item": seconds / len(examples)}
    return SampledResult(**values, sampling=result)
