"""Select runs that may be compared in one table.

They are complete and evaluated with the same settings, on the same questions, which none of them has seen.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coconut.config import RunConfig, TrainConfig, identity
from coconut.data.seen_questions import SEEN_PHRASES, all_seen
from coconut.methods import Curriculum, Unit, plan
from coconut.runs.description import CONFIG, DESCRIPTION, read_config, read_metrics
from coconut.runs.record import RunRecord, read_run
from coconut.utils.files import read_json

# Keys that identify a run and are not settings on which a comparison depends.
NOT_SETTINGS = ("name", "seed", "method", "curriculum.start_stage")


@dataclass(frozen=True)
class ComparableRun:
    """A run that may be compared with others, and one of its evaluations.

    `name` and `evaluation`: NAME and the contents of evaluation/NAME.json. `questions`: (text, gold answer) of each
    question. `correct_Q`: whether each was answered correctly.
    """

    record: RunRecord
    name: str
    evaluation: dict[str, Any]
    questions: list[tuple[str, str]]
    correct_Q: np.ndarray

    @property
    def folder(self) -> Path:
        return self.record.folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that determines a run except method, objective and seed, by dotted keys."""
        settings = _policy_settings if self.record.is_policy else _settings
        return settings(self.record.config, self.record.description)

    @cached_property
    def updates_before(self) -> int:
        """The updates of the runs from which its weights were initialized."""
        return sum(updates for updates, _ in earlier_runs(self.record))

    @property
    def method(self) -> str:
        """The method of its training; of a policy, that of the model from which it began."""
        record = self.record
        return record.description["reasoning"]["method"] if record.is_policy else record.config["method"]

    @property
    def seed(self) -> int:
        return self.record.config["seed"]

    @property
    def updates(self) -> int:
        """All updates of the weights, with `updates_before`."""
        return self.updates_before + self.record.updates_done


def natural_key(text: str) -> list[Any]:
    """A sorting key that puts 2 before 10."""
    return [(part.zfill(20) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]


def expand_patterns(names: Sequence[str]) -> list[Path]:
    """Expand patterns such as runs/table1/*-seed* to the matching folders that are runs.

    Raises ValueError if there are none, or if a run is named twice.
    """
    expanded: list[Path] = []
    for name in names:
        runs = [Path(name)]
        if glob.has_magic(name) and not Path(name).exists():
            runs = [Path(match) for match in sorted(glob.glob(name), key=natural_key) if Path(match, CONFIG).is_file()]
            if not runs:
                raise ValueError(f"No run matches {name}. Name folders that coconut train wrote.")
        expanded += runs
    seen: dict[Path, Path] = {}
    for path in expanded:
        if (one := seen.setdefault(path.resolve(), path)) is not path:
            same = f"{path} is named twice" if one == path else f"{one} and {path} are the same folder"
            raise ValueError(f"{same}. A run counts once: leave one of them out of runs=.")
    return expanded


def comparable_runs(names: Sequence[str], name: str = "test") -> list[ComparableRun]:
    """Read runs and their evaluation `name`, and check that the runs may be ranked by it.

    Raises ValueError, with the remedy, if a run is not complete or not evaluated, if an evaluation used seen data,
    non-default settings or not the best checkpoint, or if the evaluations are on different questions.
    """
    records = _complete_runs(names)
    _refuse(
        [_evaluate_command(record, name) for record in records if name not in record.evaluations],
        f"without the evaluation {name!r}",
        "Evaluate first, with the command above.",
    )
    runs = [_comparable(record, name) for record in records]
    _refuse_seen_data(runs, name)
    _refuse(
        [f"{run.folder}: {problem}" for run in runs if (problem := _not_comparable_because(run))],
        f"not evaluated ({name!r}) with the best checkpoint and the default settings",
        "Evaluate again: coconut evaluate run=DIR.",
    )
    _refuse_different_questions(runs, name)
    return runs


def sampled_evaluations(names: Sequence[str], pattern: str) -> list[ComparableRun]:
    """Read runs with their evaluations of several sampled answers whose names match a pattern, in their order.

    A run occurs once for each; in `correct_Q` a question counts as right if any of its answers is.
    Raises ValueError, with the remedy, if a run is not complete or has no such evaluation, if one used seen data, or if
    the evaluations are on different questions.
    """
    records, found = _complete_runs(names), []
    for record in records:
        named = [
            name for name, evaluation in record.evaluations.items()
            if fnmatch(name, pattern) and evaluation.get("sampling", {"samples": 1})["samples"] > 1
        ]  # fmt: skip
        if not named:
            raise ValueError(
                f"{record.folder} has no evaluation with several answers whose name matches {pattern}. Make one: "
                f"coconut evaluate run={shlex.quote(str(record.folder))} samples=8 temperature=0.8"
            )
        found += [_comparable(record, name) for name in named]
    _refuse_seen_data(found, pattern)
    _refuse_different_questions(found, pattern)
    return found


def _complete_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read runs. Raises ValueError for those that are not complete."""
    records = [read_run(folder) for folder in expand_patterns(names)]
    steps = [(record, record.step, record.total) for record in records]
    _refuse(
        [f"{record.folder}: {record.unit} {step:,} of {end:,}" for record, step, end in steps if step < end],
        "not complete, so the final accuracy is not known",
        "Train to the end, with the command that began it, or leave it out of runs=.",
    )
    return records


def _refuse(cases: Sequence[str], what: str, remedy: str) -> None:
    """Raise ValueError if there are cases; each is a line of the message."""
    if cases:
        count = "One run is" if len(cases) == 1 else f"{len(cases)} runs are"
        raise ValueError(f"{count} {what}:\n  " + "\n  ".join(cases) + f"\n{remedy}")


def _evaluate_command(record: RunRecord, name: str) -> str:
    """The command that makes this evaluation of a run."""
    data = record.config["data"]
    has_file = name == "test" and (data["test"] or data["prefix"] or data["build"])
    return f"coconut evaluate run={shlex.quote(str(record.folder))}" + ("" if has_file else " data.test=FILE")


def _comparable(record: RunRecord, name: str) -> ComparableRun:
    """Read the predictions of an evaluation. Raises ValueError if their counts differ from those of NAME.json."""
    evaluation, file = record.evaluations[name], predictions_file(record, name)
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    rows = [json.loads(line) for line in lines if line]
    if (len(rows), sum(row["correct"] for row in rows)) != (evaluation["count"], evaluation["correct"]):
        raise ValueError(
            f"{file} does not hold the {evaluation['count']:,} answers, {evaluation['correct']:,} of them right, that "
            f"{name}.json counts. Evaluate again: {_evaluate_command(record, name)}"
        )
    questions = [(row["question"], row["gold"]) for row in rows]
    correct_Q = np.array([row["correct"] for row in rows], dtype=bool)
    return ComparableRun(record, name, evaluation, questions, correct_Q)


def predictions_file(record: RunRecord, name: str) -> Path:
    """The file with every answer of an evaluation."""
    return record.folder / "evaluation" / f"{name}.predictions.jsonl"


def earlier_runs(record: RunRecord) -> list[tuple[int, dict[str, Any]]]:
    """Follow a run's `init` back through the runs from which its weights were initialized, the latest first.

    Each is given as (updates up to its checkpoint, its run.json, or an empty dict if the file is missing).
    """
    runs, init = [], record.description["init"]
    while init:
        step, folder = _checkpoint(init)
        file = folder / DESCRIPTION
        earlier = read_json(file) if step and file.is_file() else {}
        runs.append((_updates_until(folder, step), earlier))
        init = earlier.get("init")
    return runs


def _updates_until(folder: Path, step: int) -> int:
    """The updates of a run's first steps. A step of a policy may have several, or none."""
    rows = [row for row in read_metrics(folder) if row["kind"] == "train" and row["step"] <= step]
    return sum(row["updates"] for row in rows) if rows and "updates" in rows[0] else step


def _checkpoint(init: str) -> tuple[int, Path]:
    """Split RUN/checkpoints/step-N into N and RUN. N is 0 if the weights do not come from a run."""
    step = re.fullmatch(r"step-(\d+)", Path(init).name)
    return int(step[1]) if step else 0, Path(init).parent.parent


def _refuse_seen_data(runs: Sequence[ComparableRun], name: str) -> None:
    """Raise ValueError if a run, or one from which it was initialized, used the questions in training or validation."""
    cases = []
    for run in runs:
        digest = run.evaluation["sha256"]
        descriptions = [run.record.description, *(earlier for _, earlier in earlier_runs(run.record))]
        split_of_file = {row["sha256"]: split for each in descriptions for split, row in each.get("data", {}).items()}
        if run.evaluation["chose_the_checkpoint"] or split_of_file.get(digest) == "valid":
            cases.append(f"{run.folder}: {run.evaluation['file']} chose its checkpoint")
        elif digest in split_of_file:
            cases.append(f"{run.folder}: it was trained on {run.evaluation['file']}")
        elif split := all_seen(run.evaluation):
            cases.append(f"{run.folder}: the questions of {run.evaluation['file']} are {SEEN_PHRASES[split]}")
    _refuse(
        cases,
        f"evaluated ({name!r}) on training or validation data, which allows no comparison",
        "Use questions that no run has seen: split=test, or evaluate all runs with data.test=FILE.",
    )


def _not_comparable_because(run: ComparableRun) -> str | None:
    """Why the evaluation cannot be compared; None if it can."""
    best = run.record.best
    if not run.evaluation["default_settings"]:
        return "non-default settings (another checkpoint, number of thoughts, limit or precision, or sampled answers)"
    if best and run.evaluation["step"] != best["step"]:
        return f"{run.record.unit} {run.evaluation['step']:,} was evaluated, and the best is {best['step']:,}"
    return None


def _refuse_different_questions(runs: Sequence[ComparableRun], name: str) -> None:
    files: dict[tuple[str, str], list[ComparableRun]] = defaultdict(list)
    for run in runs:
        files[run.evaluation["sha256"], json.dumps(run.questions)].append(run)
    if len(files) < 2:
        return
    listed_files = [
        f"{alike[0].evaluation['file']}, SHA-256 {digest[:8]}, {len(alike[0].questions):,} questions: "
        + ", ".join(str(run.folder) for run in alike)
        for (digest, _), alike in files.items()
    ]
    remedy = "Evaluate every run with the same data.test=FILE, and name that evaluation here with split=."
    if len({digest for digest, _ in files}) == 1:
        remedy = "Evaluate them again, without too_long=skip if some runs leave questions out."
    lines = [f"The runs answered different questions ({name!r}):", *(f"  {line}" for line in listed_files), remedy]
    raise ValueError("\n".join(lines))


def _settings(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines a run except its method and seed, by dotted keys.

    Data files are identified by their checksum, initial weights by the settings of the run that trained them. A run
    that starts in stage k, from a run of the same method that ended after stage k - 1, has the settings of a run that
    trained all stages.
    """
    determining, curriculum = identity(config), config["curriculum"]
    data = {key: determining["data"][key] for key in ("task", "too_long", "unreadable", "format")}
    data |= {split: row["sha256"][:12] for split, row in description["data"].items()}
    origin, length = _origin(config, description)
    determining |= {"data": data, "curriculum": {**curriculum, "total_length": length}, "init": origin}
    training_keys = TrainConfig.__annotations__  # training settings first: labels show the first keys that differ
    determining = dict(sorted(determining.items(), key=lambda item: item[0] not in training_keys))
    settings = {key: value for key, value in _flatten(determining).items() if key not in NOT_SETTINGS}
    if origin and curriculum["start_stage"]:
        settings["curriculum.start_stage"] = curriculum["start_stage"]
    return settings


def _policy_settings(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines a policy except its model's method, its objective's name and the seed.

    Its starting point is identified by the settings of the run that trained it, and by its update if one was named.
    """
    determining, init = identity(config, RunConfig), description["init"]
    step, folder = _checkpoint(init)
    if step and (folder / DESCRIPTION).is_file() and (folder / CONFIG).is_file():
        earlier, about = read_config(folder), read_json(folder / DESCRIPTION)
        of_run = _policy_settings if "objective" in earlier else _settings
        named = [step] if _checkpoint(str(config["init"]))[0] else []
        kind = earlier["objective"]["name"] if "objective" in earlier else earlier["method"]
        init = _digest([kind, *named, of_run(earlier, about)])
    data = {key: determining["data"][key] for key in ("task", "too_long", "unreadable")}
    data |= {split: row["sha256"][:12] for split, row in description["data"].items()}
    settings = _flatten(determining | {"data": data, "init": init})
    return {key: value for key, value in settings.items() if key not in (*NOT_SETTINGS, "objective.name")}


def _digest(identifying: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest()[:8]


def _origin(config: dict[str, Any], description: dict[str, Any]) -> tuple[str | None, int]:
    """The origin of the initial weights, None if all stages of the curriculum were trained; and the total length."""
    curriculum, init = config["curriculum"], description["init"]
    total = curriculum["total_length"]
    if not init:
        return "nothing" if curriculum["start_stage"] else None, total
    step, folder = _checkpoint(init)
    if not step or not (folder / DESCRIPTION).is_file() or not (folder / CONFIG).is_file():
        return str(init), total
    earlier = read_config(folder)
    length = total + step if curriculum["length_unit"] == Unit.updates else total
    if earlier["method"] == config["method"] and step == _skipped_updates(config["method"], curriculum):
        return None, length
    digest = _digest([earlier["method"], step, _settings(earlier, read_json(folder / DESCRIPTION))])
    return f"{earlier['method']}, update {step}, {digest}", length


def _skipped_updates(method: str, values: Mapping[str, Any]) -> int | None:
    """The number of updates of the stages before `start_stage`; None if stages are counted in epochs."""
    curriculum = Curriculum.from_dict(dict(values))
    if curriculum.length_unit is not Unit.updates:
        return None
    whole = plan(method, replace(curriculum, start_stage=0, total_length=10**9))
    return sum(stage.length for stage in whole.stages if stage.index < curriculum.start_stage)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
