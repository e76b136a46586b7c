"""Honest evaluation: every question once, every prediction written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.engine.world import World
from coconut.generation.generate import Generated, forward_passes, longest_first, pad_rows
from coconut.generation.thoughts import StopCriterion
from coconut.methods import PromptFormat, Reasoning, Slot
from coconut.tasks import TASKS, Task

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM


@dataclass
class Prediction:
    """One answered question. `new_tokens` counts language without the end of the sequence; thoughts are apart."""

    question: str
    gold: str
    text: str
    predicted: str | None
    correct: bool
    chain_match: bool | None
    num_thoughts: int
    new_tokens: int
    truncated: bool
    mode: str = ""

    @property
    def passes(self) -> int:
        return forward_passes(self.new_tokens, self.truncated, self.num_thoughts, self.mode)


@dataclass
class EvalResult:
    """Shares are between 0 and 1; `interval` is the 95 % Wilson interval of the accuracy.

    `guess`: the expected accuracy of choosing among the answers that the question names, where it names
    any. `chain_match`: share of questions whose written steps are exactly those of the data that the
    model still writes; None where that is not a number of whole steps. `num_thoughts` is their mean,
    `passes` the mean number of forward passes, for prefix, thoughts and tokens. `left_out`: questions too
    long for the model's context, or with a gold answer that would be judged wrong. `modes`: of a hybrid model, the
    share of each that it chose from.
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
    """The evaluation was asked to stop before its end."""


class Evaluated(NamedTuple):
    """`thoughts` (N, K, D) are what was fed, in the order of the examples, zeros after an example's last."""

    result: EvalResult
    predictions: list[Prediction]
    thoughts: Tensor


def evaluate(
    lm: LatentLM,
    task: Task,
    examples: Sequence[Example],
    *,
    question_ids: Sequence[list[int]] | None = None,
    num_thoughts: int | None = None,
    thoughts: Tensor | None = None,
    stop: StopCriterion | None = None,
    mode: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] = lambda done, correct: None,
    world: World | None = None,
    asked: object = None,
) -> Evaluated:
    """Answer and judge every example, longest questions first, greedily.

    `question_ids`: the encoded questions, where they are at hand.
    `thoughts` (N, K, D) are fed in place of the model's own; `stop` ends them early; `mode` is forced on
    a hybrid model (see `generate`).
    `on_batch(done, correct)` is called after each batch. The processes of a `world` share the examples, and
    each is given the whole result. Raises EvaluationInterrupted, in all of them, once `asked` is true in one.
    """
    import torch

    world = world or World()
    reasoning = lm.reasoning
    rows = question_ids or encode_questions(lm.tokenizer, [e.question for e in examples], reasoning.format)
    predictions: dict[int, Prediction] = {}
    fed: dict[int, Tensor] = {}
    start = time.perf_counter()
    mine = range(world.rank, len(examples), world.size)
    for places in longest_first([rows[i] for i in mine], batch_size):
        if asked:
            break
        world.set_activity("in an evaluation")
        chosen = [mine[place] for place in places]
        ids, mask = pad_rows([rows[i] for i in chosen], lm.special.pad)
        given = None if thoughts is None else thoughts[chosen]
        out = lm.generate(
            ids, mask, max_new_tokens=max_new_tokens, num_thoughts=num_thoughts, thoughts=given, stop=stop, mode=mode
        )
        for row, i in enumerate(chosen):
            predictions[i] = _judge(task, examples[i], reasoning, out, row)
        fed |= zip(chosen, (thoughts.clone() for thoughts in out.thoughts), strict=True)  # not views of the batch's
        on_batch(len(predictions), sum(p.correct for p in predictions.values()))
    if world.any_process(bool(asked)):
        raise EvaluationInterrupted
    predictions = {i: p for part in world.all_gather_object(predictions) for i, p in part.items()}
    fed = {i: thought for part in world.all_gather_object(fed) for i, thought in part.items()}
    seconds = time.perf_counter() - start
    ordered = [predictions[i] for i in range(len(examples))]
    in_order = torch.nn.utils.rnn.pad_sequence([fed[i] for i in range(len(examples))], batch_first=True)
    return Evaluated(_summary(task, examples, ordered, seconds, reasoning.modes), ordered, in_order)


def answer_key(task: Task, text: str, form: PromptFormat) -> Hashable | None:
    """What the task compares of the answer in what a model wrote; None if there is none."""
    found = task.read_answer(text, form)
    return None if found is None else task.key(found)


def _judge(task: Task, example: Example, reasoning: Reasoning, out: Generated, row: int) -> Prediction:
    text, mode, thoughts = out.texts[row], out.modes[row], int(out.num_thoughts[row])
    reasoning = reasoning.in_mode(mode) if mode else reasoning
    form = reasoning.format
    predicted = task.read_answer(text, form)
    gold = _steps_left(example, reasoning, thoughts)
    match = gold is not None and _written(task, text, form) == _written(task, form.written(gold, example.answer), form)
    return Prediction(
        question=example.question,
        gold=example.answer,
        text=text,
        predicted=predicted,
        correct=task.judge(predicted, example.answer),
        chain_match=None if gold is None else match,
        num_thoughts=thoughts,
        new_tokens=int(out.lengths[row]),
        truncated=bool(out.truncated[row]),
        mode=mode,
    )


def _steps_left(example: Example, reasoning: Reasoning, thoughts: int) -> Sequence[str] | None:
    """The steps that the model is expected to write; None if it was trained to begin within one."""
    cut = steps_cut(reasoning, thoughts)
    if cut is None or reasoning.tokens_cut is None:
        return ()
    return None if reasoning.tokens_cut else example.steps[cut:]


def steps_cut(reasoning: Reasoning, thoughts: int) -> int | None:
    """How many steps so many thoughts stand for; None: all."""
    cut = reasoning.steps_cut
    own = reasoning.slot is not Slot.thought or thoughts == reasoning.num_thoughts or not reasoning.thoughts_per_step
    return cut if cut is None or own else thoughts // reasoning.thoughts_per_step


def _written(task: Task, text: str, form: PromptFormat) -> str:
    """The steps in a text, spaces apart."""
    return "".join("".join(task.read_steps(text, form)).split())


def _summary(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], seconds: float, modes: Sequence[str]
) -> EvalResult:
    from scipy.stats import binomtest

    count, correct = len(predictions), sum(p.correct for p in predictions)
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    candidates = [task.candidates(e.question) for e in examples]
    guess = sum(1 / len(c) for c in candidates if c) / count if all(candidates) else None
    mean_tokens = sum(p.new_tokens for p in predictions) / count
    matches = [p.chain_match for p in predictions]
    thoughts = sum(p.num_thoughts for p in predictions) / count
    return EvalResult(
        count=count,
        correct=correct,
        accuracy=correct / count,
        interval=(float(interval.low), float(interval.high)),
        chance_accuracy=guess,
        chain_match=None if None in matches else sum(map(bool, matches)) / count,
        mean_new_tokens=mean_tokens,
        num_thoughts=thoughts,
        passes=sum(p.passes for p in predictions) / count,
        truncated=sum(p.truncated for p in predictions) / count,
        seconds_per_item=seconds / count,
        modes={mode: sum(p.mode == mode for p in predictions) / count for mode in modes},
    )


def task_of(data: dict[str, Any]) -> Task:
    """What judges a run's answers. Raises ValueError if nothing does."""
    if not data["task"]:
        raise ValueError("The run has no task, as that of a reward model. Name the run that it started from.")
    return TASKS[data["task"]]


def describe(result: EvalResult) -> str:
    """The result as a person reads it."""
    low, high = (100 * bound for bound in result.interval)
    accuracy = f"{100 * result.accuracy:.1f} % ({result.correct} of {result.count})"
    lines = [("accuracy", f"{accuracy}, 95 % interval {low:.1f} to {high:.1f}")]
    if result.chance_accuracy is not None:
        lines.append(("guessing", f"{100 * result.chance_accuracy:.1f} %"))
    lines.append(("new tokens", f"{result.mean_new_tokens:.1f} of language, {result.num_thoughts:.3g} thoughts"))
    if result.modes:
        lines.append(("modes", ", ".join(f"{mode} {100 * share:.1f} %" for mode, share in result.modes.items())))
    if result.chain_match is not None:
        lines.append(("chain match", f"{100 * result.chain_match:.1f} %"))
    lines.append(("cut answers", f"{100 * result.truncated:.1f} %"))
    if result.left_out:
        lines.append(
            ("left out", f"{result.left_out} questions, too long or with a gold answer that would be judged wrong")
        )
    lines.append(("time", f"{1000 * result.seconds_per_item:.1f} ms a question"))
    return "\n".join(f"  {name:<12} {value}" for name, value in lines)
