"""Honest evaluation: every question once, every prediction written down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coconut.config import EvaluateConfig, StopRule, TooLong
from coconut.data.datasets import file_of_split
from coconut.data.examples import Example, read_examples
from coconut.data.seen_questions import all_seen, seen_by, told_questions
from coconut.data.sequences import slot_ids
from coconut.data.tokenization import TokenizedData, encode_questions, unknown_words
from coconut.engine.world import World
from coconut.generation.generate import Generated, forward_passes, longest_first, pad_rows
from coconut.generation.thoughts import Stop
from coconut.gold import read_back, warn_of_limit
from coconut.methods import REASONING_FILE, PromptFormat, Reasoning, Slot
from coconut.tasks import TASKS, Task
from coconut.utils.files import make_writable, read_json, sha256, write_json, write_text
from coconut.utils.hydra_app import application

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
    cut: bool
    mode: str = ""

    @property
    def passes(self) -> int:
        return forward_passes(self.new_tokens, self.cut, self.num_thoughts, self.mode)


@dataclass
class Result:
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
    guess: float | None
    chain_match: float | None
    mean_new_tokens: float
    num_thoughts: float
    passes: float
    cut: float
    seconds_per_item: float
    left_out: int = 0
    modes: dict[str, float] = field(default_factory=dict)


class Abandoned(Exception):
    """The evaluation was asked to stop before its end."""


class Evaluated(NamedTuple):
    """`thoughts` (N, K, D) are what was fed, in the order of the examples, zeros after an example's last."""

    result: Result
    predictions: list[Prediction]
    thoughts: Tensor


def evaluate(
    lm: LatentLM,
    task: Task,
    examples: Sequence[Example],
    *,
    num_thoughts: int | None = None,
    thoughts: Tensor | None = None,
    stop: Stop | None = None,
    mode: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] = lambda done, correct: None,
    world: World | None = None,
    asked: object = None,
) -> Evaluated:
    """Answer and judge every example, longest questions first, greedily.

    `thoughts` (N, K, D) are fed in place of the model's own; `stop` ends them early; `mode` is forced on
    a hybrid model (see `generate`).
    `on_batch(done, correct)` is called after each batch. The processes of a `world` share the examples, and
    each is given the whole result. Raises Abandoned, in all of them, once `asked` is true in one.
    """
    import torch

    world = world or World()
    reasoning = lm.reasoning
    rows = encode_questions(lm.tokenizer, [e.question for e in examples], reasoning.format)
    predictions: dict[int, Prediction] = {}
    fed: dict[int, Tensor] = {}
    start = time.perf_counter()
    mine = range(world.rank, len(examples), world.size)
    for places in longest_first([rows[i] for i in mine], batch_size):
        if asked:
            break
        world.mark("in an evaluation")
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
    if world.any(bool(asked)):
        raise Abandoned
    predictions = {i: p for part in world.gather(predictions) for i, p in part.items()}
    fed = {i: thought for part in world.gather(fed) for i, thought in part.items()}
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
        cut=bool(out.cut[row]),
        mode=mode,
    )


def _steps_left(example: Example, reasoning: Reasoning, thoughts: int) -> Sequence[str] | None:
    """The steps that the model is expected to write; None if it was trained to begin within one."""
    cut = _steps_cut(reasoning, thoughts)
    if cut is None or reasoning.tokens_cut is None:
        return ()
    return None if reasoning.tokens_cut else example.steps[cut:]


def _steps_cut(reasoning: Reasoning, thoughts: int) -> int | None:
    """How many steps so many thoughts stand for; None: all."""
    cut = reasoning.steps_cut
    own = reasoning.slot is not Slot.thought or thoughts == reasoning.num_thoughts or not reasoning.thoughts_per_step
    return cut if cut is None or own else thoughts // reasoning.thoughts_per_step


def _written(task: Task, text: str, form: PromptFormat) -> str:
    """The steps in a text, spaces apart."""
    return "".join("".join(task.read_steps(text, form)).split())


def _summary(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], seconds: float, modes: Sequence[str]
) -> Result:
    from scipy.stats import binomtest

    count, correct = len(predictions), sum(p.correct for p in predictions)
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    candidates = [task.candidates(e.question) for e in examples]
    guess = sum(1 / len(c) for c in candidates if c) / count if all(candidates) else None
    mean_tokens = sum(p.new_tokens for p in predictions) / count
    matches = [p.chain_match for p in predictions]
    thoughts = sum(p.num_thoughts for p in predictions) / count
    return Result(
        count=count,
        correct=correct,
        accuracy=correct / count,
        interval=(float(interval.low), float(interval.high)),
        guess=guess,
        chain_match=None if None in matches else sum(map(bool, matches)) / count,
        mean_new_tokens=mean_tokens,
        num_thoughts=thoughts,
        passes=sum(p.passes for p in predictions) / count,
        cut=sum(p.cut for p in predictions) / count,
        seconds_per_item=seconds / count,
        modes={mode: sum(p.mode == mode for p in predictions) / count for mode in modes},
    )


def run(config: EvaluateConfig) -> int:
    """Evaluate a trained run on one of its splits, or a run or a saved model on any file in the data format."""
    from coconut.engine.launch import on_processes
    from coconut.utils.console import only_our_words

    only_our_words()
    return on_processes(config.launch, config.engine, "coconut.evaluate", lambda w: evaluate_together(config, w))


def evaluate_together(config: EvaluateConfig, world: World) -> int:
    """What each process of an evaluation does."""
    from coconut.build import load_model, load_run
    from coconut.engine.base import autocast
    from coconut.generation.stop_classifier import classifier_of
    from coconut.tracking import read_config
    from coconut.utils.console import say, working

    own_file, saved = getattr(config.data, config.split), is_saved(config)
    data: dict[str, Any] = {"task": config.task} if saved else read_config(config.run)["data"]
    if config.task not in (None, data["task"]):
        raise ValueError(f"task={config.task} is for saved models; {config.run} was made for {data['task']}.")
    path = world.first_does(lambda: file_of_split(data, config.split, own_file))
    examples = read_examples(path)[: config.limit]
    place = Path("evaluation", Path(config.run).resolve().name) if saved else Path(config.run, "evaluation")
    folder = Path(config.output) if config.output else place
    world.first_does(lambda: make_writable(folder))
    trained = None if saved else load_run(config.run, config.checkpoint, config.engine, world)
    lm = trained.lm if trained else load_model(config.run, config.checkpoint, config.engine, world)
    step = trained.step if trained else None
    rows = encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    kept = _fitting_or_told(lm, rows, config)
    task = task_of(data)
    with world.first_before_others():
        gold, right = read_back(
            lm, [examples[i] for i in kept], task, file=str(path), unreadable=config.unreadable, keep_unknown=True,
            cache_dir=data.get("cache_dir"),
        )  # fmt: skip
    kept = [kept[i] for i in right]
    fitting = [examples[i] for i in kept]
    stop = None
    if trained and config.stop is StopRule.classifier:
        with world.first_before_others():
            stop = classifier_of(config.run, trained, config.batch_size).stop
    which = f", update {step}" if trained else ""
    say(f"Evaluating {_asked(lm.reasoning, config)}{which}, on {len(fitting)} questions of {path}")
    if unknown := _unknown_words(lm, [rows[i] for i in kept]):
        say(f"warning: {unknown} words of the questions are not in the model's vocabulary.")
    limit, counted = config.max_new_tokens or lm.reasoning.max_new_tokens, config.num_thoughts
    forms = [
        form if counted is None else replace(form, steps_cut=_steps_cut(form, counted))
        for form in lm.reasoning.forms(config.mode)
    ]
    warn_of_limit(gold, forms, limit, str(path))
    share = -(-len(fitting) // world.size)
    with working("evaluating", share) as bar, autocast(lm.device, config.engine.precision):
        result, predictions, _ = evaluate(
            lm,
            task,
            fitting,
            num_thoughts=config.num_thoughts,
            stop=stop,
            mode=config.mode,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            on_batch=lambda done, correct: bar(done, f"accuracy so far {100 * correct / done:.1f} %"),
            world=world,
        )
    if not world.first:
        return 0
    result.left_out = len(examples) - len(fitting)
    digest = sha256(path)
    unusual = _unusual(config)
    name = "-".join([f"{Path(path).stem}-{digest[:8]}" if own_file else config.split, *unusual])
    record = {
        **asdict(result),
        "split": config.split,
        "file": str(path),
        "sha256": digest,
        "batch_size": config.batch_size,
        "checkpoint": config.checkpoint if trained else None,
        "step": step,
        "method": lm.reasoning.method,
        "stage": lm.reasoning.stage,
        "usual": not unusual,
        "seen": seen_by(config.run, [example.question for example in fitting]),
        "chose_the_checkpoint": config.split == "valid" and not own_file,
    }
    say(describe(result))
    write_text(
        folder / f"{name}.predictions.jsonl",
        "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions),
    )
    write_json(folder / f"{name}.json", record)
    if record["chose_the_checkpoint"]:
        say("note: this file chose the checkpoint, so its accuracy is no test result.")
    elif record["seen"] and any(record["seen"].values()):
        what = "so its accuracy is no test result" if all_seen(record) else "which may make its accuracy too high"
        say(f"note: {told_questions(result.count, record['seen'])}, {what}.")
    say(f"Every prediction: {folder / name}.predictions.jsonl")
    return 0


def is_saved(config: EvaluateConfig) -> bool:
    """Whether it is a saved model that is evaluated, and no run. Raises ValueError for what only a run has."""
    here = Path(config.run, REASONING_FILE).is_file()
    given = config.task and getattr(config.data, config.split)
    if not here and (Path(config.run).exists() or not given):
        return False
    if not given:
        raise ValueError(
            f"{config.run} is a saved model and does not say on what it was trained. Name task=TASK (one of "
            f"{', '.join(TASKS)}) and data.{config.split}=FILE, too."
        )
    for key, usual in (("checkpoint", "best"), ("stop", StopRule.constant)):
        if (value := getattr(config, key)) != usual:
            raise ValueError(f"{key}={value} is for a run; {config.run} is a saved model.")
    return True


def task_of(data: dict[str, Any]) -> Task:
    """What judges a run's answers. Raises ValueError if nothing does."""
    if not data["task"]:
        raise ValueError("The run has no task, as that of a reward model. Name the run that it started from.")
    return TASKS[data["task"]]


def fitting(lm: LatentLM, questions: Sequence[str], more: int = 0, mode: str | None = None) -> list[int]:
    """Which questions leave room for so many thoughts more than the model's own, and an answer."""
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    room = room_for_question(lm, lm.reasoning.num_thoughts + more if more else None, mode)
    return [i for i, row in enumerate(rows) if len(row) <= room]


def room_for_question(lm: LatentLM, num_thoughts: int | None = None, mode: str | None = None) -> int:
    """Tokens that a question may have, with an answer of one token after it; by default with the model's own thoughts.

    A hybrid model may choose any of its modes unless one is forced, so that there is to be room in each.
    """
    own = lm.reasoning
    forms = [own.in_mode(name) for name in own.modes if mode in (None, name)] or [own]
    counts = [form.num_thoughts if num_thoughts is None else num_thoughts for form in forms]
    slots = [len(slot_ids(form, lm.special, count)) for form, count in zip(forms, counts, strict=True)]
    return lm.context - max(slots) - bool(own.modes) - 1


def _fitting_or_told(lm: LatentLM, rows: list[list[int]], config: EvaluateConfig) -> list[int]:
    """Which questions leave room for an answer. Raises ValueError unless the others may be left out."""
    room = room_for_question(lm, config.num_thoughts, config.mode)
    too_long = [i for i, row in enumerate(rows) if len(row) > room]
    if too_long and (config.too_long is TooLong.error or len(too_long) == len(rows)):
        shown = ", ".join(f"question {i + 1} ({len(rows[i])} tokens)" for i in too_long[:5])
        raise ValueError(
            f"{len(too_long)} of {len(rows)} questions leave no room for an answer in the model's context of "
            f"{lm.context} tokens: {shown}{', ...' if len(too_long) > 5 else ''}. Leave them out with too_long=skip."
        )
    return [i for i, row in enumerate(rows) if len(row) <= room]


def _asked(reasoning: Reasoning, config: EvaluateConfig) -> str:
    """In words: which method, at which stage, with how many thoughts."""
    count = reasoning.num_thoughts if config.num_thoughts is None else config.num_thoughts
    slot = "" if reasoning.slot is Slot.nothing else f", {count} {reasoning.slot.value}{'s' * (count != 1)}"
    return f"{reasoning.method}, stage {reasoning.stage}{slot}"


def _unusual(config: EvaluateConfig) -> list[str]:
    """The settings that make an evaluation another one, for its name."""
    usual = EvaluateConfig(run=config.run)
    keys = ("checkpoint", "num_thoughts", "stop", "mode", "max_new_tokens", "limit")
    found = [f"{key}-{getattr(config, key)}" for key in keys if getattr(config, key) != getattr(usual, key)]
    precision = config.engine.precision
    return found if precision is usual.engine.precision else [*found, precision.value]


def describe(result: Result) -> str:
    """The result as a person reads it."""
    low, high = (100 * bound for bound in result.interval)
    accuracy = f"{100 * result.accuracy:.1f} % ({result.correct} of {result.count})"
    lines = [("accuracy", f"{accuracy}, 95 % interval {low:.1f} to {high:.1f}")]
    if result.guess is not None:
        lines.append(("guessing", f"{100 * result.guess:.1f} %"))
    lines.append(("new tokens", f"{result.mean_new_tokens:.1f} of language, {result.num_thoughts:.3g} thoughts"))
    if result.modes:
        lines.append(("modes", ", ".join(f"{mode} {100 * share:.1f} %" for mode, share in result.modes.items())))
    if result.chain_match is not None:
        lines.append(("chain match", f"{100 * result.chain_match:.1f} %"))
    lines.append(("cut answers", f"{100 * result.cut:.1f} %"))
    if result.left_out:
        lines.append(
            ("left out", f"{result.left_out} questions, too long or with a gold answer that would be judged wrong")
        )
    lines.append(("time", f"{1000 * result.seconds_per_item:.1f} ms a question"))
    return "\n".join(f"  {name:<12} {value}" for name, value in lines)


def _unknown_words(lm: LatentLM, rows: list[list[int]]) -> int:
    return unknown_words(TokenizedData.from_lists(rows, [[len(row)] for row in rows]), lm.tokenizer)


def read_results(run: Path | str) -> dict[str, dict[str, Any]]:
    """All evaluations of a run, by name."""
    return {path.stem: read_json(path) for path in sorted((Path(run) / "evaluation").glob("*.json"))}


main = application("evaluate", EvaluateConfig, run)

if __name__ == "__main__":
    main()
