"""The command that evaluates a run, or a saved model, on a file of questions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.config import TooLong
from coconut.data.datasets import file_of_split
from coconut.data.examples import read_examples
from coconut.data.seen_questions import all_seen, describe_questions, seen_by
from coconut.data.tokenization import TokenizedData, encode_questions, unknown_words
from coconut.engine.world import World
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.gold_answers import read_back, warn_of_limit
from coconut.generation.config import StopRule
from coconut.methods import REASONING_FILE, Reasoning, Slot
from coconut.tasks import TASKS
from coconut.utils.files import ensure_writable, sha256, write_json, write_text
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM
from coconut.evaluation.evaluator import _steps_cut, describe, evaluate, room_for_question, task_of


def run(config: EvaluateConfig) -> int:
    """Evaluate a trained run on one of its splits, or a run or a saved model on any file in the data format."""
    from coconut.engine.launch import run_on_processes
    from coconut.utils.console import silence_libraries

    silence_libraries()
    return run_on_processes(config.launch, config.engine, "coconut.evaluate", lambda w: run_rank(config, w))


def run_rank(config: EvaluateConfig, world: World) -> int:
    """What each process of an evaluation does."""
    from coconut.engine.base import autocast
    from coconut.runs.description import read_config
    from coconut.runs.loading import classifier_of, load_model, load_run
    from coconut.utils.console import log, progress_bar

    own_file, saved = getattr(config.data, config.split), is_saved(config)
    data: dict[str, Any] = {"task": config.task} if saved else read_config(config.run)["data"]
    if config.task not in (None, data["task"]):
        raise ValueError(f"task={config.task} is for saved models; {config.run} was made for {data['task']}.")
    path = world.on_main_process(lambda: file_of_split(data, config.split, own_file))
    examples = read_examples(path)[: config.limit]
    place = Path("evaluation", Path(config.run).resolve().name) if saved else Path(config.run, "evaluation")
    folder = Path(config.output) if config.output else place
    world.on_main_process(lambda: ensure_writable(folder))
    trained = None if saved else load_run(config.run, config.checkpoint, config.engine, world)
    lm = trained.lm if trained else load_model(config.run, config.checkpoint, config.engine, world)
    step = trained.step if trained else None
    rows = encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    kept = _fitting_or_told(lm, rows, config)
    task = task_of(data)
    with world.main_process_first():
        gold, right = read_back(
            lm, [examples[i] for i in kept], task, file=str(path), unreadable=config.unreadable, keep_unknown=True,
            cache_dir=data.get("cache_dir"),
        )  # fmt: skip
    kept = [kept[i] for i in right]
    fitting = [examples[i] for i in kept]
    stop = None
    if trained and config.stop is StopRule.classifier:
        with world.main_process_first():
            stop = classifier_of(config.run, trained, config.batch_size).stop
    which = f", update {step}" if trained else ""
    log(f"Evaluating {_asked(lm.reasoning, config)}{which}, on {len(fitting)} questions of {path}")
    if unknown := _unknown_words(lm, [rows[i] for i in kept]):
        log(f"warning: {unknown} words of the questions are not in the model's vocabulary.")
    limit, counted = config.max_new_tokens or lm.reasoning.max_new_tokens, config.num_thoughts
    forms = [
        form if counted is None else replace(form, steps_cut=_steps_cut(form, counted))
        for form in lm.reasoning.forms(config.mode)
    ]
    warn_of_limit(gold, forms, limit, str(path))
    share = -(-len(fitting) // world.size)
    with progress_bar("evaluating", share) as bar, autocast(lm.device, config.engine.precision):
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
    if not world.is_main:
        return 0
    result.left_out = len(examples) - len(fitting)
    digest = sha256(path)
    unusual = _non_default_settings(config)
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
        "default_settings": not unusual,
        "seen": seen_by(config.run, [example.question for example in fitting]),
        "chose_the_checkpoint": config.split == "valid" and not own_file,
    }
    log(describe(result))
    write_text(
        folder / f"{name}.predictions.jsonl",
        "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions),
    )
    write_json(folder / f"{name}.json", record)
    if record["chose_the_checkpoint"]:
        log("note: this file chose the checkpoint, so its accuracy is no test result.")
    elif record["seen"] and any(record["seen"].values()):
        what = "so its accuracy is no test result" if all_seen(record) else "which may make its accuracy too high"
        log(f"note: {describe_questions(result.count, record['seen'])}, {what}.")
    log(f"Every prediction: {folder / name}.predictions.jsonl")
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


def _fitting_or_told(lm: LatentLM, rows: list[list[int]], config: EvaluateConfig) -> list[int]:
    """Which questions leave room for an answer. Raises ValueError unless the others may be left out."""
    room = room_for_question(lm, config.num_thoughts, config.mode)
    too_long = [i for i, row in enumerate(rows) if len(row) > room]
    if too_long and (config.too_long is TooLong.error or len(too_long) == len(rows)):
        shown = ", ".join(f"question {i + 1} ({len(rows[i])} tokens)" for i in too_long[:5])
        raise ValueError(
            f"{len(too_long)} of {len(rows)} questions leave no room for an answer in the model's context of "
            f"{lm.max_sequence_length} tokens: {shown}{', ...' if len(too_long) > 5 else ''}. Leave them out with "
            "too_long=skip."
        )
    return [i for i, row in enumerate(rows) if len(row) <= room]


def _asked(reasoning: Reasoning, config: EvaluateConfig) -> str:
    """In words: which method, at which stage, with how many thoughts."""
    count = reasoning.num_thoughts if config.num_thoughts is None else config.num_thoughts
    slot = "" if reasoning.slot is Slot.none else f", {count} {reasoning.slot.value}{'s' * (count != 1)}"
    return f"{reasoning.method}, stage {reasoning.stage}{slot}"


def _non_default_settings(config: EvaluateConfig) -> list[str]:
    """The settings that make an evaluation another one, for its name."""
    usual = EvaluateConfig(run=config.run)
    keys = ("checkpoint", "num_thoughts", "stop", "mode", "max_new_tokens", "limit")
    found = [f"{key}-{getattr(config, key)}" for key in keys if getattr(config, key) != getattr(usual, key)]
    precision = config.engine.precision
    return found if precision is usual.engine.precision else [*found, precision.value]


def _unknown_words(lm: LatentLM, rows: list[list[int]]) -> int:
    return unknown_words(TokenizedData.from_lists(rows, [[len(row)] for row in rows]), lm.tokenizer)


main = application("evaluate", EvaluateConfig, run)

if __name__ == "__main__":
    main()
