"""Evaluate a model: answer every question once, judge the answers, and summarize them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.engine.world import World
from coconut.generation.config import SoftThinking
from coconut.generation.generate import Generated, longest_first, pad_rows
from coconut.generation.thoughts import StopCriterion
from coconut.methods import PromptFormat, Reasoning
from coconut.tasks import TASKS, Task
from coconut.tasks.chain import read_answer, read_steps

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM


@dataclass
class Prediction:
    """A question, its gold answer and the model's answer.

    `text`: the whole generated text. `predicted`: the answer read from it, None if there is none. `new_tokens`: text
    tokens without the end of the sequence; `num_thoughts` are counted separately. `chain_match`: see EvalResult.
    """

    question: str
    gold: str
    text: str
    predicted: str | None
    correct: bool
    chain_match: bool | None
    num_thoughts: int
    new_tokens: int
    passes: int
    truncated: bool
    mode: str = ""


@dataclass
class EvalResult:
    """The summary of an evaluation. Shares are between 0 and 1.

    `interval`: the 95 % Wilson confidence interval of the accuracy. `chance_accuracy`: the expected accuracy of a
    random choice among the answers that the question names; None if a question names none.
    `chain_match`: the share of answers whose written steps equal those of the data, among the questions that have steps
    left to write; None if there is no such question, or if thoughts replace a part of a step. `num_thoughts`: the mean
    number of thoughts. `passes`: the mean number of forward passes, for prompt, thoughts and text tokens. `left_out`:
    the number of questions that are too long for the model's context, or whose gold answer would be judged wrong.
    `modes`: for a hybrid model, the share of answers in each mode.
    """

    count: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    chance_accuracy: float | None
    chain_match: float | None
    mean_new_tokens: float
    num_thoughts: float
    passes: float
    truncated: float
    seconds_per_item: float
    left_out: int = 0
    modes: dict[str, float] = field(default_factory=dict)


class EvaluationInterrupted(Exception):
    """A stop was requested before the end of the evaluation."""


class Evaluated(NamedTuple):
    """The result of `evaluate`. `thoughts` (N, K, D): those that were fed for each example, zero after its last one."""

    result: EvalResult
    predictions: list[Prediction]
    thoughts: Tensor


def evaluate(
    lm: LatentLM, task: Task, examples: Sequence[Example], *, question_ids: Sequence[list[int]] | None = None,
    num_thoughts: int | None = None, thoughts: Tensor | None = None, stop: StopCriterion | None = None,
    soft_thinking: SoftThinking | None = None, mode: str | None = None, max_new_tokens: int | None = None,
    batch_size: int = 64, on_batch: Callable[[int, int], None] = lambda done, correct: None, world: World | None = None,
    stop_requested: object = None, thought_noise: float = 0.0, seed: int = 0,
) -> Evaluated:  # fmt: skip
    """Answer every example with greedy decoding, longest questions first, and judge the answers.

    A batch takes as long as its longest answer. So answers that have not ended when most have (`_usual_length`) are
    generated once more, together, with the whole limit of new tokens.

    `question_ids`: the encoded questions, if they are available. `thoughts` (N, K, D): fed instead of those that the
    model computes. `stop`: a criterion that ends thinking early. `soft_thinking`: mixtures of words in place of the
    chain. `mode`: forced on a hybrid model (see `generate`).
    `on_batch(done, correct)` is called after each batch. `thought_noise`: the standard deviation of noise on the
    thoughts, drawn for each question from (`seed`, its index).
    The examples are divided among the processes of `world`, and every process gets the whole result. All processes
    raise EvaluationInterrupted when `stop_requested` is true in one of them.
    """
    import torch

    world = world or World()
    reasoning = lm.reasoning
    rows = question_ids or encode_questions(lm.tokenizer, [e.question for e in examples], reasoning.format)
    predictions: dict[int, Prediction] = {}
    fed: dict[int, Tensor] = {}
    start_time = time.perf_counter()
    own_indices = list(range(world.rank, len(examples), world.size))
    limit = reasoning.max_new_tokens if max_new_tokens is None else max_new_tokens
    for whole in (False, True) if batch_size > 1 else (True,):
        left = [i for i in own_indices if i not in predictions]
        for positions in longest_first([rows[i] for i in left], batch_size):
            if stop_requested:
                break
            world.set_activity("in an evaluation")
            indices = [left[position] for position in positions]
            ids, mask = pad_rows([rows[i] for i in indices], lm.special.pad)
            given_thoughts = None if thoughts is None else thoughts[indices]
            noise: dict[str, Any] = {}
            if thought_noise:
                noise = {"thought_noise": thought_noise, "random_keys": [(seed, i) for i in indices]}
            most = limit if whole else _usual_length(predictions.values(), limit)
            out = lm.generate(
                ids, mask, max_new_tokens=most, num_thoughts=num_thoughts, thoughts=given_thoughts, stop=stop,
                soft_thinking=soft_thinking, mode=mode, **noise,
            )  # fmt: skip
            for row, i in enumerate(indices):
                if most == limit or not out.truncated[row]:
                    predictions[i] = prediction_of(task, examples[i], writes(reasoning, soft_thinking), out, row)
                    fed[i] = out.thoughts[row].clone()  # a view would keep the thoughts of the whole batch
            if predictions:
                on_batch(len(predictions), sum(p.correct for p in predictions.values()))
    if world.any_process(bool(stop_requested)):
        raise EvaluationInterrupted
    predictions = {i: p for part in world.all_gather_object(predictions) for i, p in part.items()}
    fed = {i: thought for part in world.all_gather_object(fed) for i, thought in part.items()}
    seconds = time.perf_counter() - start_time
    ordered = [predictions[i] for i in range(len(examples))]
    thoughts_NKD = torch.nn.utils.rnn.pad_sequence([fed[i] for i in range(len(examples))], batch_first=True)
    return Evaluated(summarize(task, examples, ordered, seconds, reasoning.modes), ordered, thoughts_NKD)


def _usual_length(predictions: Collection[Prediction], limit: int) -> int:
    """New tokens within which most answers end: twice the median so far, a quarter of the limit if there is none."""
    known = statistics.median(prediction.new_tokens for prediction in predictions) if predictions else limit / 8
    return min(max(math.ceil(2 * known), 1), limit)


def answer_key(task: Task, text: str, form: PromptFormat) -> Hashable | None:
    """The key by which the task compares the answer in a generated text; None if it has no answer."""
    answer = read_answer(text, form)
    return None if answer is None else task.key(answer)


def prediction_of(task: Task, example: Example, reasoning: Reasoning, out: Generated, row: int) -> Prediction:
    """The judged answer of a row of what the model generated."""
    text, mode, thoughts = out.texts[row], out.modes[row], int(out.num_thoughts[row])
    reasoning = reasoning.in_mode(mode)
    form = reasoning.format
    predicted = read_answer(text, form)
    chain_match = None
    if gold_steps := _steps_left(example, reasoning, thoughts):
        gold_text = form.written(gold_steps, example.answer)
        chain_match = _steps_text(text, form) == _steps_text(gold_text, form)
    return Prediction(
        question=example.question, gold=example.answer, text=text, predicted=predicted,
        correct=task.judge(predicted, example.answer), chain_match=chain_match, num_thoughts=thoughts,
        new_tokens=int(out.lengths[row]), passes=int(out.passes[row]), truncated=bool(out.truncated[row]), mode=mode,
    )  # fmt: skip


def writes(reasoning: Reasoning, soft_thinking: SoftThinking | None) -> Reasoning:
    """The settings by which an answer is read: with Soft Thinking the model writes no chain."""
    return replace(reasoning, steps_cut=None) if soft_thinking else reasoning


def _steps_left(example: Example, reasoning: Reasoning, thoughts: int) -> Sequence[str]:
    """The steps that the model should write after the thoughts; none if thoughts replace a part of a step."""
    cut = steps_cut(reasoning, thoughts)
    return () if cut is None or reasoning.tokens_cut != 0 else example.steps[cut:]


def steps_cut(reasoning: Reasoning, thoughts: int) -> int | None:
    """The number of steps that a number of thoughts replaces; None: all steps."""
    cut = reasoning.steps_cut
    c = reasoning.thoughts_per_step
    if cut is None or not reasoning.slot.thinks or thoughts == reasoning.num_thoughts or not c:
        return cut
    return thoughts // c


def _steps_text(text: str, form: PromptFormat) -> str:
    """The steps in a text, without spaces."""
    return "".join("".join(read_steps(text, form)).split())


def summarize(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], seconds: float, modes: Sequence[str]
) -> EvalResult:
    """The summary of one answer to each example, which took so many seconds. `modes`: those of a hybrid model."""
    count, correct = len(predictions), sum(p.correct for p in predictions)
    candidates = [task.candidates(e.question) for e in examples]
    chance_accuracy = sum(1 / len(c) for c in candidates if c) / count if all(candidates) else None
    mean_tokens = sum(p.new_tokens for p in predictions) / count
    matches = [p.chain_match for p in predictions if p.chain_match is not None]
    thoughts = sum(p.num_thoughts for p in predictions) / count
    return EvalResult(
        count=count, correct=correct, accuracy=correct / count, interval=wilson_interval(correct, count),
        chance_accuracy=chance_accuracy, chain_match=sum(matches) / len(matches) if matches else None,
        mean_new_tokens=mean_tokens, num_thoughts=thoughts, passes=sum(p.passes for p in predictions) / count,
        truncated=sum(p.truncated for p in predictions) / count, seconds_per_item=seconds / count,
        modes={mode: sum(p.mode == mode for p in predictions) / count for mode in modes},
    )  # fmt: skip


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def task_of(data: dict[str, Any]) -> Task:
    """The task of a run, which judges its answers. Raises ValueError if the run has none."""
    if not data["task"]:
        raise ValueError("The run has no task, as that of a reward model. Name the run that it started from.")
    return TASKS[data["task"]]


def describe(result: EvalResult) -> str:
    """The result as aligned lines of text."""
    low, high = (100 * bound for bound in result.interval)
    accuracy = f"{100 * result.accuracy:.1f} % ({result.correct} of {result.count})"
    lines = [("accuracy", f"{accuracy}, 95 % confidence interval {low:.1f} to {high:.1f}")]
    if result.chance_accuracy is not None:
        lines.append(("chance", f"{100 * result.chance_accuracy:.1f} %"))
    lines.append(("new tokens", f"{result.mean_new_tokens:.1f} text tokens, {result.num_thoughts:.3g} thoughts"))
    if result.modes:
        lines.append(("modes", ", ".join(f"{mode} {100 * share:.1f} %" for mode, share in result.modes.items())))
    if result.chain_match is not None:
        lines.append(("chain match", f"{100 * result.chain_match:.1f} %"))
    lines.append(("truncated", f"{100 * result.truncated:.1f} %"))
    if result.left_out:
        lines.append(
            ("left out", f"{result.left_out} questions, too long or with a gold answer that would be judged wrong")
        )
    lines.append(("time", f"{1000 * result.seconds_per_item:.1f} ms a question"))
    return "\n".join(f"  {name:<12} {value}" for name, value in lines)
