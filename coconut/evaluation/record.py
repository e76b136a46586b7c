"""Write an evaluation: SPLIT.json with result and settings, SPLIT.predictions.jsonl with every answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from coconut.config import Precision
from coconut.data.seen_questions import all_seen, describe_questions, seen_by
from coconut.evaluation.config import EvaluateConfig, Sampling
from coconut.evaluation.evaluator import EvalResult, Prediction
from coconut.evaluation.sampling import SampledAnswers
from coconut.generation.config import StopRule
from coconut.methods import REASONING_FILE, Reasoning
from coconut.tasks import TASKS
from coconut.utils.console import log
from coconut.utils.files import sha256, write_json, write_text


def is_saved_model(config: EvaluateConfig) -> bool:
    """Whether `run` names a saved model and not a run. Raises ValueError for settings that only a run supports."""
    here = Path(config.run, REASONING_FILE).is_file()
    given = config.suite.sets or (config.judge and getattr(config.data, config.split))
    on_hub = not Path(config.run).exists() and config.run.count("/") == 1  # OWNER/NAME
    if not here and not (on_hub and given):
        return False
    if not given:
        raise ValueError(
            f"{config.run} is a saved model, which does not record its task or data. Add judge=NAME (one of "
            f"{', '.join(TASKS)}) and data.{config.split}=FILE, or suite=NAME."
        )
    for key, default in (("checkpoint", "best"), ("stop", StopRule.constant)):
        if (value := getattr(config, key)) != default:
            raise ValueError(f"{key}={value} is for runs only; {config.run} is a saved model.")
    return True


def output_folder(config: EvaluateConfig, saved: bool) -> Path:
    """The folder of the results: by default RUN/evaluation, or evaluation/NAME for a saved model."""
    default = Path("evaluation", Path(config.run).resolve().name) if saved else Path(config.run, "evaluation")
    return Path(config.output) if config.output else default


def describe_settings(reasoning: Reasoning, config: EvaluateConfig) -> str:
    """A phrase with the method, its stage, and the number of thoughts."""
    count = reasoning.num_thoughts if config.num_thoughts is None else config.num_thoughts
    slot = "" if reasoning.slot.is_empty else f", {count} {reasoning.slot.noun}{'s' * (count != 1)}"
    if reasoning.slot.merges:
        slot = f", at most {count} thoughts of {reasoning.slot.group} words each"
    soft = f", Soft Thinking with at most {config.soft.max_thoughts} thoughts" if config.soft else ""
    return f"{reasoning.method}, stage {reasoning.stage}{slot}{soft}"


def non_default_settings(config: EvaluateConfig, default_judge: str | None) -> list[str]:
    """The settings that differ from the default and affect the result, as parts of the evaluation's name.

    `default_judge`: how answers are judged without `judge`, if the evaluation has one way for all of its questions.
    """
    usual = config.judge and default_judge and TASKS[config.judge] is TASKS[default_judge]
    default = EvaluateConfig(run=config.run, judge=config.judge if usual else None)
    sampled = [one.name for one in fields(Sampling)]
    keys = ("checkpoint", "judge", "num_thoughts", "rate", "stop", "mode", "max_new_tokens", *sampled, "limit")
    found = [f"{key}-{value}" for key in keys if (value := getattr(config, key)) != getattr(default, key)]
    found += [f"reward-{Path(config.reward).resolve().name}"] if config.reward else []
    if config.soft:
        found.append("-".join(["soft_thinking", *config.soft.non_default]))
    precision = config.engine.precision
    return found if precision is default.engine.precision else [*found, precision.value]


def are_default(settings: list[str]) -> bool:
    """Whether these are the default settings up to the precision, which the name of an evaluation has."""
    return not set(settings) - {precision.value for precision in Precision}


def file_stem(config: EvaluateConfig, file: str) -> str:
    """The name of the evaluation of a file, without its settings: the split, or the name and digest of another file."""
    other_file = getattr(config.data, config.split)
    return f"{Path(file).stem}-{sha256(file)[:8]}" if other_file else config.split


def write_evaluation(
    folder: Path, name: str, config: EvaluateConfig, result: EvalResult,
    predictions: Sequence[Prediction] | Sequence[SampledAnswers], *, file: str, step: int | None, reasoning: Reasoning,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the result and every prediction, and return the record of NAME.json. `more`: further entries of it.

    `step`: the update that was evaluated, None for a saved model.
    """
    record: dict[str, Any] = {
        **asdict(result), "split": config.split, "file": file, "sha256": sha256(file), "batch_size": config.batch_size,
        "checkpoint": None if step is None else config.checkpoint, "step": step, "method": reasoning.method,
        "stage": reasoning.stage,
        "seen": seen_by(config.run, [prediction.question for prediction in predictions]),
        "soft_thinking": config.soft and asdict(config.soft),
        "chose_the_checkpoint": config.split == "valid" and not config.data.valid,
        **({"reward": config.reward} if config.reward else {}), **more,
    }  # fmt: skip
    (folder / f"{name}.json").unlink(missing_ok=True)  # not to stand beside the predictions of another evaluation
    lines = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    write_text(folder / f"{name}.predictions.jsonl", lines)
    write_json(folder / f"{name}.json", record)
    _warn_if_seen(record)
    log(f"All predictions: {folder / name}.predictions.jsonl")
    return record


def _warn_if_seen(record: dict[str, Any]) -> None:
    """Print a note if the accuracy is no test result."""
    if record["chose_the_checkpoint"]:
        log("note: this file chose the checkpoint, so its accuracy is no test result.")
    elif record["seen"] and any(record["seen"].values()):
        what = "so its accuracy is no test result" if all_seen(record) else "which may make its accuracy too high"
        log(f"note: {describe_questions(record['count'], record['seen'])}, {what}.")
