"""Evaluate a suite: several sets with one loaded model. Each set is written when it is done, and not repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from coconut.data.datasets import BuilderFailed, builders_code, file_of_set
from coconut.data.examples import read_examples
from coconut.evaluation.config import SuiteConfig
from coconut.evaluation.file_evaluation import FileEvaluator
from coconut.evaluation.record import are_default
from coconut.tasks import TASKS
from coconut.utils.console import log
from coconut.utils.files import read_json, sha256

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

FOLDER = "suites"  # inside the folder of evaluations
# Settings on which the result of a set does not depend, or which stand in its key in another form.
NOT_IN_KEY = ("run", "checkpoint", "split", "data", "suite", "output", "reward", "engine", "launch", "soft_thinking")


@dataclass
class Sets:
    """The file of each set of a suite that was found, and for each other one the reason why there is none."""

    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def find_sets(suite: SuiteConfig, cache_dir: str | None) -> Sets:
    """Find or make the files of a suite. Raises ValueError if there is none for any set."""
    found = Sets()
    for name, its in suite.sets.items():
        try:
            found.files[name] = file_of_set(name, its.builder or name, its.build, its.hub, suite.folder, cache_dir)
        except BuilderFailed as failure:
            found.missing[name] = failure.reason
        except OSError as error:
            found.missing[name] = str(error)
    if not found.files:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in found.missing.items())
        raise ValueError(
            f"No set of suite={suite.name} can be had:\n{reasons}\nName folders with the sets: "
            "suite.folder=FOLDER,FOLDER. docs/evaluation.md says which files they may hold."
        )
    return found


def evaluate_suite(evaluator: FileEvaluator, sets: Sets, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Evaluate the sets that are not evaluated yet. Returns the records of all, in the order of the suite.

    `settings`: the parts of the results' names. A set whose rows cannot be judged is moved to `sets.missing`.
    """
    weights = evaluator.world.on_main_process(lambda: weights_digest(evaluator.lm))
    records: dict[str, dict[str, Any]] = {}
    for name, file in list(sets.files.items()):
        key = {**_settings_of_set(evaluator, name), "weights": weights, "sha256": sha256(file)}
        if kept := _finished(evaluator, stem_of(name, settings), key):
            log(f"{name}: evaluated before with the same settings, {100 * kept['accuracy']:.1f} %")
            records[name] = kept
            continue
        try:
            records[name] = _evaluate_set(evaluator, name, file, key, settings)
        except UnusableSet as error:
            log(f"{name}: left out. {error}")
            sets.missing[name] = str(error)
            del sets.files[name]
    return records


def stem_of(name: str, settings: list[str]) -> str:
    """The name of a result: that of the set or suite, and the settings that are not the default."""
    return "-".join([name, *settings])


class UnusableSet(ValueError):
    """A set whose rows cannot be read or judged."""


def _evaluate_set(
    evaluator: FileEvaluator, name: str, file: str, key: dict[str, Any], settings: list[str]
) -> dict[str, Any]:
    config = evaluator.config
    its, task = config.suite.sets[name], TASKS[key["judge"]]
    evaluator = evaluator.with_limit(its.max_new_tokens)
    try:
        examples = read_examples(file)
        if its.rows and len(examples) != its.rows:
            raise ValueError(f"{file} has {len(examples):,} rows, and the set has {its.rows:,}: it is another one.")
        examples = examples[: config.limit]
        selected = evaluator.select(examples, task, file)
    except ValueError as error:
        raise UnusableSet(str(error)) from error
    timed = min(config.suite.timed, len(selected.examples))
    seconds = evaluator.seconds_at_batch_1(selected, task, timed)
    return evaluator.evaluate(
        stem_of(name, settings), selected, task, file=file, left_out=len(examples) - len(selected.examples),
        judge=key["judge"], default_settings=are_default(settings), set=name, key=key, seconds_at_batch_1=seconds,
        timed=timed,
    )  # fmt: skip


def _settings_of_set(evaluator: FileEvaluator, name: str) -> dict[str, Any]:
    """All that the result of a set depends on beside weights and file: settings, and the code of the judges."""
    config = evaluator.config
    its = config.suite.sets[name]
    settings = {one.name: getattr(config, one.name) for one in fields(config) if one.name not in NOT_IN_KEY}
    return {
        **settings, "judge": str(config.judge or its.judge),
        "max_new_tokens": config.max_new_tokens or its.max_new_tokens, "timed": config.suite.timed,
        "precision": config.engine.precision, "device": evaluator.lm.device.type, "processes": evaluator.world.size,
        "soft_thinking": config.soft and asdict(config.soft), "code": builders_code(),
    }  # fmt: skip


def _finished(evaluator: FileEvaluator, stem: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an evaluation that was made with these settings; None if there is none."""

    def read() -> dict[str, Any] | None:
        file = evaluator.folder / f"{stem}.json"
        record = read_json(file) if file.is_file() else {}
        return record if record.get("key") == key else None

    return evaluator.world.on_main_process(read)


def weights_digest(lm: LatentLM) -> str:
    """SHA-256 over the reasoning, and the names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256(repr(lm.reasoning).encode())
    for name, weight in sorted(lm.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
