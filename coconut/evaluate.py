"""Honest evaluation: every question once, every prediction written down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.cli import application
from coconut.config import EvaluateConfig
from coconut.data import Example, encode_questions, read_examples
from coconut.files import read_json, sha256, write_json, write_text
from coconut.generate import pad_rows
from coconut.methods import PromptFormat, Reasoning
from coconut.tasks import TASKS, Task

if TYPE_CHECKING:
    from coconut.model import LatentLM


@dataclass
class Prediction:
    """One answered question. `new_tokens` counts language without the end of the sequence; thoughts are apart."""

    question: str
    gold: str
    text: str
    predicted: str | None
    correct: bool
    chain_match: bool
    new_tokens: int
    cut: bool


@dataclass
class Result:
    """Shares are between 0 and 1; `interval` is the 95 % Wilson interval of the accuracy.

    `guess`: the expected accuracy of choosing among the answers that the question names, where it names
    any. `chain_match`: share of questions whose written steps are exactly those of the data that the
    model still writes. `passes`: forward passes a question, thoughts and tokens together.
    """

    count: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    guess: float | None
    chain_match: float
    mean_new_tokens: float
    num_thoughts: int
    passes: float
    cut: float
    seconds_per_item: float


def evaluate(
    lm: LatentLM,
    task: Task,
    examples: Sequence[Example],
    *,
    num_thoughts: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] = lambda done, correct: None,
) -> tuple[Result, list[Prediction]]:
    """Answer and judge every example, longest questions first, greedily.

    `on_batch(done, correct)` is called after each batch.
    """
    reasoning = lm.reasoning
    rows = encode_questions(lm.tokenizer, [e.question for e in examples], reasoning.format)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    predictions: dict[int, Prediction] = {}
    thoughts, start = 0, time.perf_counter()
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask = pad_rows([rows[i] for i in chosen], lm.special.pad)
        out = lm.generate(ids, mask, max_new_tokens=max_new_tokens, num_thoughts=num_thoughts)
        thoughts = out.num_thoughts
        written = _steps_cut(reasoning, num_thoughts)
        for i, text, length, cut in zip(chosen, out.texts, out.lengths.tolist(), out.cut.tolist(), strict=True):
            predictions[i] = _judge(task, examples[i], text, written, reasoning.format, length, cut)
        on_batch(len(predictions), sum(p.correct for p in predictions.values()))
    seconds = time.perf_counter() - start
    ordered = [predictions[i] for i in range(len(examples))]
    return _summary(task, examples, ordered, thoughts, seconds), ordered


def _steps_cut(reasoning: Reasoning, num_thoughts: int | None) -> int | None:
    """How many steps the model is expected to have replaced by its thoughts; None: all."""
    if num_thoughts is None or num_thoughts == reasoning.num_thoughts or not reasoning.thoughts_per_step:
        return reasoning.steps_cut
    return num_thoughts // reasoning.thoughts_per_step


def _judge(
    task: Task, example: Example, text: str, steps_cut: int | None, form: PromptFormat, length: int, cut: bool
) -> Prediction:
    predicted = task.read_answer(text, form.answer_mark)
    steps = task.read_steps(text, form.answer_mark, form.step_end)
    gold_steps = [] if steps_cut is None else list(example.steps[steps_cut:])
    return Prediction(
        question=example.question,
        gold=example.answer,
        text=text,
        predicted=predicted,
        correct=task.judge(predicted, example.answer),
        chain_match=[_plain(s) for s in steps] == [_plain(s) for s in gold_steps],
        new_tokens=length,
        cut=cut,
    )


def _plain(step: str) -> str:
    return "".join(step.split())


def _summary(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], thoughts: int, seconds: float
) -> Result:
    from scipy.stats import binomtest

    count, correct = len(predictions), sum(p.correct for p in predictions)
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    candidates = [task.candidates(e.question) for e in examples]
    guess = sum(1 / len(c) for c in candidates if c) / count if all(candidates) else None
    mean_tokens = sum(p.new_tokens for p in predictions) / count
    return Result(
        count=count,
        correct=correct,
        accuracy=correct / count,
        interval=(float(interval.low), float(interval.high)),
        guess=guess,
        chain_match=sum(p.chain_match for p in predictions) / count,
        mean_new_tokens=mean_tokens,
        num_thoughts=thoughts,
        passes=1 + thoughts + mean_tokens,
        cut=sum(p.cut for p in predictions) / count,
        seconds_per_item=seconds / count,
    )


def run(config: EvaluateConfig) -> int:
    """Evaluate a trained run on one of its splits, or on any file in the data format."""
    from coconut.checkpoint import Checkpoints, load_state
    from coconut.data import unknown_words
    from coconut.engine.local import autocast, choose_device
    from coconut.model import LatentLM
    from coconut.tracking import only_our_words, read_config, say, working

    only_our_words()
    trained = read_config(config.run)
    path = getattr(config.data, config.split) or trained["data"][config.split]
    if not path:
        raise ValueError(f"The run has no {config.split} file. Name one with data.{config.split}=FILE.")
    examples = read_examples(path)[: config.limit]
    checkpoint = Checkpoints(config.run).find(config.checkpoint)
    state = load_state(checkpoint)
    lm = LatentLM.from_pretrained(checkpoint)
    lm.to(choose_device(config.engine.device))
    task = TASKS[trained["data"]["task"]]
    thoughts = lm.reasoning.num_thoughts if config.num_thoughts is None else config.num_thoughts
    say(
        f"Evaluating {lm.reasoning.method}, stage {lm.reasoning.stage}, {thoughts} {lm.reasoning.slot.value}s, "
        f"update {state['step']}, on {len(examples)} questions of {path}"
    )
    if unknown := _unknown(lm, examples, unknown_words):
        say(f"warning: {unknown} words of the questions are not in the model's vocabulary.")
    with working("evaluating", len(examples)) as bar, autocast(lm.device, config.engine.precision):
        result, predictions = evaluate(
            lm,
            task,
            examples,
            num_thoughts=config.num_thoughts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            on_batch=lambda done, correct: bar(done, f"accuracy so far {100 * correct / done:.1f} %"),
        )
    name = Path(path).stem if getattr(config.data, config.split) else config.split
    usual = EvaluateConfig(run=config.run)
    for key in ("checkpoint", "num_thoughts", "max_new_tokens", "limit"):
        if getattr(config, key) != getattr(usual, key):
            name += f"-{key}-{getattr(config, key)}"
    if config.engine.precision is not usual.engine.precision:
        name += f"-{config.engine.precision.value}"
    folder = Path(config.run) / "evaluation"
    record = {
        **asdict(result),
        "split": config.split,
        "file": str(path),
        "sha256": sha256(path),
        "checkpoint": config.checkpoint,
        "step": state["step"],
        "method": lm.reasoning.method,
        "stage": lm.reasoning.stage,
        "chose_the_checkpoint": config.split == "valid" and not config.data.valid,
    }
    write_text(
        folder / f"{name}.predictions.jsonl",
        "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions),
    )
    write_json(folder / f"{name}.json", record)
    say(describe(result))
    if record["chose_the_checkpoint"]:
        say("note: this file chose the checkpoint, so its accuracy is no test result.")
    say(f"Every prediction: {folder / name}.predictions.jsonl")
    return 0


def describe(result: Result) -> str:
    """The result as a person reads it."""
    low, high = (100 * bound for bound in result.interval)
    guess = "" if result.guess is None else f"  guessing     {100 * result.guess:.1f} %\n"
    return (
        f"  accuracy     {100 * result.accuracy:.1f} % ({result.correct} of {result.count}), "
        f"95 % interval {low:.1f} to {high:.1f}\n{guess}"
        f"  new tokens   {result.mean_new_tokens:.1f} of language, {result.num_thoughts} thoughts\n"
        f"  chain match  {100 * result.chain_match:.1f} %\n"
        f"  cut answers  {100 * result.cut:.1f} %\n"
        f"  time         {1000 * result.seconds_per_item:.1f} ms a question"
    )


def _unknown(lm: LatentLM, examples: Sequence[Example], count: Any) -> int:
    from coconut.data import TokenizedData

    rows = encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    return count(TokenizedData.from_lists(rows, [[len(row)] for row in rows]), lm.tokenizer)


def read_results(run: Path | str) -> dict[str, dict[str, Any]]:
    """All evaluations of a run, by name."""
    return {path.stem: read_json(path) for path in sorted((Path(run) / "evaluation").glob("*.json"))}


main = application("evaluate", EvaluateConfig, run)

if __name__ == "__main__":
    main()
