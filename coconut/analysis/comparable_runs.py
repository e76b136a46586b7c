"""Which runs may stand in one table: complete, evaluated alike, on the same questions, new to all of them."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.config import TrainConfig, identity
from coconut.data.seen_questions import SEEN_PHRASES, all_seen
from coconut.methods import Curriculum, Unit, plan
from coconut.runs.description import CONFIG, DESCRIPTION, read_config
from coconut.utils.files import read_json

if TYPE_CHECKING:
    from coconut.runs.record import RunRecord

# These say which of the runs of a group a run is.
NO_SETTINGS = ("name", "seed", "method", "curriculum.start_stage")


@dataclass(frozen=True)
class ComparableRun:
    """A run that may stand in a table, with one of its evaluations.

    `settings`: what it is but for its method and seed, by dotted keys. `before`: updates of the runs whose
    weights it began with. `questions`: of each, its text and right answer.
    """

    record: RunRecord
    found: dict[str, Any]
    settings: dict[str, Any]
    before: int
    questions: list[tuple[str, str]]
    correct_Q: np.ndarray

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def method(self) -> str:
        return self.record.config["method"]

    @property
    def seed(self) -> int:
        return self.record.config["seed"]


def natural(text: str) -> list[Any]:
    """Sorts 2 before 10."""
    return [(part.zfill(20) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]


def folders(names: Sequence[str]) -> list[Path]:
    """The runs' folders, with patterns such as runs/table1/*-seed* filled in.

    A pattern stands for the runs that it matches and for nothing else. Raises ValueError if it matches none,
    or if a run is named twice.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if glob.has_magic(name) and not path.exists():
            matched = [Path(match) for match in sorted(glob.glob(name), key=natural)]
            runs = [match for match in matched if (match / CONFIG).is_file()]
            if not runs:
                raise ValueError(f"No run matches {name}. Name folders that coconut train wrote.")
            found += runs
        else:
            found.append(path)
    seen: dict[Path, Path] = {}
    for path in found:
        if (one := seen.setdefault(path.resolve(), path)) is not path:
            same = f"{path} is named twice" if one == path else f"{one} and {path} are the same folder"
            raise ValueError(f"{same}. A run counts once: leave one of them out of runs=.")
    return found


def comparable_runs(names: Sequence[str], name: str = "test") -> list[ComparableRun]:
    """The runs with their evaluation of this name, if all may be ranked by it.

    Raises ValueError that says why not and what to do: a run that is not complete or not evaluated; an
    evaluation on data that it was trained or chosen with, with non-default settings, or of a checkpoint that is no
    longer the best; evaluations on different questions.
    """
    from coconut.runs.record import read_run

    records = [read_run(folder) for folder in folders(names)]
    _refuse(
        [
            f"{r.folder}: update {r.step:,} of {r.description['updates']:,}"
            for r in records
            if r.step < r.description["updates"]
        ],
        "not complete, so nobody knows how good it will be",
        "Train to the end, with the command that began it, or leave it out of runs=.",
    )
    _refuse(
        [_evaluate(record, name) for record in records if name not in record.evaluations],
        f"without the evaluation {name!r}",
        "Evaluate first, with the command above.",
    )
    runs = [_comparable(record, name) for record in records]
    _refuse_known(runs, name)
    _refuse(
        [f"{run.folder}: {problem}" for run in runs if (problem := _not_comparable_because(run))],
        f"not evaluated ({name!r}) as the others are, at its best and with the default settings",
        "Evaluate again: coconut evaluate run=DIR.",
    )
    _refuse_other_questions(runs, name)
    return runs


def _refuse(cases: Sequence[str], what: str, remedy: str) -> None:
    if cases:
        count = "One run is" if len(cases) == 1 else f"{len(cases)} runs are"
        raise ValueError(f"{count} {what}:\n  " + "\n  ".join(cases) + f"\n{remedy}")


def _evaluate(record: RunRecord, name: str) -> str:
    data = record.config["data"]
    has_file = name == "test" and (data["test"] or data["prefix"] or data["build"])
    return f"coconut evaluate run={shlex.quote(str(record.folder))}" + ("" if has_file else " data.test=FILE")


def _comparable(record: RunRecord, name: str) -> ComparableRun:
    """Raises ValueError if the predictions do not belong to the evaluation."""
    found, file = record.evaluations[name], record.folder / "evaluation" / f"{name}.predictions.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    rows = [json.loads(line) for line in lines if line]
    if (len(rows), sum(row["correct"] for row in rows)) != (found["count"], found["correct"]):
        raise ValueError(
            f"{file} does not hold the {found['count']:,} answers, {found['correct']:,} of them right, that "
            f"{name}.json counts. Evaluate again: {_evaluate(record, name)}"
        )
    return ComparableRun(
        record=record,
        found=found,
        settings=settings_of(record),
        before=sum(step for step, _ in began_with(record)),
        questions=[(row["question"], row["gold"]) for row in rows],
        correct_Q=np.array([row["correct"] for row in rows], dtype=bool),
    )


def began_with(record: RunRecord) -> list[tuple[int, dict[str, Any]]]:
    """The runs whose weights this one began with, the nearest first: the update, and their run.json if it is there."""
    found, init = [], record.description["init"]
    while init:
        step, folder = _checkpoint(init)
        file = folder / DESCRIPTION
        earlier = read_json(file) if step and file.is_file() else {}
        found.append((step, earlier))
        init = earlier.get("init")
    return found


def _checkpoint(init: str) -> tuple[int, Path]:
    """The update and the run of RUN/checkpoints/step-N; update 0 if the weights are not of a run."""
    step = re.fullmatch(r"step-(\d+)", Path(init).name)
    return int(step[1]) if step else 0, Path(init).parent.parent


def _refuse_known(runs: Sequence[ComparableRun], name: str) -> None:
    """The questions must be new to every run, and to those that it began with."""
    cases = []
    for run in runs:
        digest = run.found["sha256"]
        descriptions = [run.record.description, *(earlier for _, earlier in began_with(run.record))]
        known = {row["sha256"]: split for each in descriptions for split, row in each.get("data", {}).items()}
        if run.found["chose_the_checkpoint"] or known.get(digest) == "valid":
            cases.append(f"{run.folder}: {run.found['file']} chose its checkpoint")
        elif digest in known:
            cases.append(f"{run.folder}: it was trained on {run.found['file']}")
        elif split := all_seen(run.found):
            cases.append(f"{run.folder}: the questions of {run.found['file']} are {SEEN_PHRASES[split]}")
    _refuse(
        cases,
        f"evaluated ({name!r}) on data that it was made with, which ranks nothing",
        "Take questions that no run has seen: split=test, or evaluate all runs with data.test=FILE.",
    )


def _not_comparable_because(run: ComparableRun) -> str | None:
    best = run.record.best
    if not run.found["default_settings"]:
        return "non-default settings (another checkpoint, number of thoughts, limit or precision)"
    if best and run.found["step"] != best["step"]:
        return f"update {run.found['step']:,} was evaluated, and the best is {best['step']:,}"
    return None


def _refuse_other_questions(runs: Sequence[ComparableRun], name: str) -> None:
    files: dict[tuple[str, str], list[ComparableRun]] = defaultdict(list)
    for run in runs:
        files[run.found["sha256"], json.dumps(run.questions)].append(run)
    if len(files) < 2:
        return
    same_file = len({digest for digest, _ in files}) == 1
    listed_files = [
        f"{chosen[0].found['file']}, SHA-256 {digest[:8]}, {len(chosen[0].questions):,} questions: "
        + ", ".join(str(run.folder) for run in chosen)
        for (digest, _), chosen in files.items()
    ]
    if same_file:
        remedy = "Evaluate them again, without too_long=skip if there are questions that some leave out."
    else:
        remedy = "Evaluate every run with the same data.test=FILE, and name that evaluation here with split=."
    raise ValueError(
        f"The runs answered different questions ({name!r}):\n  " + "\n  ".join(listed_files) + f"\n{remedy}"
    )


# What a run is.


def settings_of(record: RunRecord) -> dict[str, Any]:
    """What a run is but for its method and seed.

    Data files count by their content, and the weights that it began with by what made them. A run that took
    up its own method's curriculum where another had trained just the stages before counts as a whole one.
    """
    return _settings(record.config, record.description)


def _settings(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    files, curriculum = description["data"], config["curriculum"]
    data = {
        **{key: identity(config)["data"][key] for key in ("task", "too_long", "unreadable", "format")},
        **{split: row["sha256"][:12] for split, row in files.items()},
    }
    began, length = _origin(config, description)
    made_of = {**identity(config), "data": data, "curriculum": {**curriculum, "total_length": length}, "init": began}
    training_keys = TrainConfig.__annotations__  # what training alone has tells the most, and comes first
    made_of = dict(sorted(made_of.items(), key=lambda item: item[0] not in training_keys))
    settings = {key: value for key, value in _flat(made_of).items() if key not in NO_SETTINGS}
    if began and curriculum["start_stage"]:
        settings["curriculum.start_stage"] = curriculum["start_stage"]
    return settings


def _origin(config: dict[str, Any], description: dict[str, Any]) -> tuple[str | None, int]:
    """What the weights came from, None if the run went through all of its own stages; the length of it all."""
    curriculum, init = config["curriculum"], description["init"]
    total = curriculum["total_length"]
    if not init:
        return (None, total) if not curriculum["start_stage"] else ("nothing", total)
    step, folder = _checkpoint(init)
    if not step or not (folder / DESCRIPTION).is_file() or not (folder / CONFIG).is_file():
        return str(init), total
    earlier_config, earlier = read_config(folder), read_json(folder / DESCRIPTION)
    made = json.dumps([earlier_config["method"], step, _settings(earlier_config, earlier)], sort_keys=True)
    length = total + step if curriculum["length_unit"] == Unit.updates else total
    if earlier_config["method"] == config["method"] and step == _skipped(config["method"], curriculum):
        return None, length
    digest = hashlib.sha256(made.encode()).hexdigest()[:8]
    return f"{earlier_config['method']}, update {step}, {digest}", length


def _skipped(method: str, values: Mapping[str, Any]) -> int | None:
    """The updates of the stages before the one with which a run began; None where stages are counted in epochs."""
    curriculum = Curriculum.from_dict(dict(values))
    if curriculum.length_unit is not Unit.updates:
        return None
    whole = plan(method, replace(curriculum, start_stage=0, total_length=10**9))
    return sum(stage.length for stage in whole.stages if stage.index < curriculum.start_stage)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
