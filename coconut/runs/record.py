"""RunRecord: a run's configuration, metrics, evaluations and studies, read from its folder for reports and tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.data.seen_questions import all_seen, describe_questions
from coconut.methods import Plan, Reasoning, Stage, Unit
from coconut.runs.description import CONFIG, DESCRIPTION, read_config, read_metrics, read_results
from coconut.runs.study import FOLDER, Study
from coconut.utils.files import read_json

DASH = "–"


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder.

    `test`: name of the evaluation that is the run's test result, one on a complete file that was not used for training
    or validation, with the model's own number of thoughts. `answers`: that evaluation's predictions, or else the
    newest samples of training; `answers_of` describes which. `studies`: measurements of coconut.analyze, by name.
    """

    folder: Path
    config: dict[str, Any]
    description: dict[str, Any]
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    test: str | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    answers_of: str = ""
    studies: dict[str, Study] = field(default_factory=dict)

    @property
    def stages(self) -> list[Stage]:
        return [Stage.from_dict(row) for row in self.description["plan"]["stages"]]

    @property
    def is_policy(self) -> bool:
        """Whether coconut rl made it."""
        return "objective" in self.config

    @property
    def unit(self) -> str:
        """What its progress is counted in."""
        return "step" if self.is_policy else "update"

    @property
    def method(self) -> str:
        """The method, and the objective of a policy after it: "coconut + grpo"."""
        if self.is_policy:
            return f"{self.description['reasoning']['method']} + {self.config['objective']['name']}"
        return self.config["method"]

    @property
    def reasoning(self) -> Reasoning:
        """How the model reasons at the end of its training; of a hybrid one, in the mode that its studies are about."""
        if self.is_policy:
            own = Reasoning.from_dict(self.description["reasoning"])
        else:
            plan = Plan(self.config["method"], Unit(self.description["plan"]["unit"]), tuple(self.stages))
            own = Reasoning.at(plan, self.stages[-1])
        return own.in_mode(next((study.facts["mode"] for study in self.studies.values() if "mode" in study.facts), ""))

    @property
    def step(self) -> int:
        """The number of updates done."""
        return max((row["step"] for row in self.train), default=0)

    @property
    def total(self) -> int:
        """The updates of the whole run; for a policy the steps."""
        return self.description["updates" if "updates" in self.description else "num_steps"]

    @property
    def updates_done(self) -> int:
        """The updates of the weights; a policy may have several in a step."""
        return sum(row["updates"] for row in self.train) if self.is_policy else self.step

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation of the best checkpoint, which is chosen in the last stage, or by the reward of a policy."""
        if self.is_policy:
            return max(self.valid, key=lambda row: row["reward"], default=None)
        stage = self.stages[-1]
        rows = rows_of_stage(self.valid, stage)
        return max(rows, key=lambda row: stage.checkpoint_score(row["accuracy"], row["loss"]), default=None)

    @property
    def chance_accuracy(self) -> float | None:
        """The accuracy of guessing, from the test result or else another evaluation; None if none has it."""
        accuracies = [self.evaluations[name]["chance_accuracy"] for name in [self.test, *self.evaluations] if name]
        return next((accuracy for accuracy in accuracies if accuracy is not None), None)

    @property
    def study_note(self) -> str:
        """A sentence on the checkpoint and questions of the studies if the test result has others, else ""."""
        facts = next((study.facts for study in self.studies.values()), {})
        keys = ("step", "sha256", "count")
        test = self.evaluations[self.test] if self.test else dict.fromkeys(keys)
        if not facts or (facts["step"], facts["sha256"], facts["questions"]) == tuple(test[key] for key in keys):
            return ""
        return (
            f"The following was measured on {self.unit} {facts['step']:,}, with {facts['questions']:,} questions of "
            f"{Path(facts['file']).name}."
        )

    @property
    def decided_note(self) -> str:
        """A sentence on what a model that decides by itself how it thinks was made to do in the studies, else ""."""
        facts = {name: value for study in self.studies.values() for name, value in study.facts.items()}
        if mode := facts.get("mode"):
            return (
                f"The model chooses by its first token how to answer. Thoughts were measured in the mode {mode}, "
                "whatever it would have chosen."
            )
        if alike := facts.get("alike"):
            return (
                f"The model ends its thoughts itself. Thoughts were measured on the {alike['questions']:,} of "
                f"{alike['of']:,} questions for which it takes {alike['thoughts']}, the most common number, and with "
                "exactly so many."
            )
        return ""

    def updates(self, stage: Stage) -> int:
        """The length of a stage in updates."""
        in_epochs = self.description["plan"]["unit"] == Unit.epochs
        return stage.length * (self.description["updates_per_epoch"] if in_epochs else 1)


def rows_of_stage(rows: list[dict[str, Any]], stage: Stage) -> list[dict[str, Any]]:
    return [row for row in rows if row["stage"] == stage.index]


def read_run(folder: Path | str) -> RunRecord:
    """Read a run. Raises ValueError if the folder is not a run, or is a reward model."""
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"{folder} is not a complete run: it has {CONFIG} but no {DESCRIPTION}. Run the same coconut train command "
            "again, which writes both."
        )
    description, metrics = read_json(folder / DESCRIPTION), read_metrics(folder)
    if description.get("trained") == "reward model":
        raise ValueError(
            f"{folder} is a reward model, which answers no questions. Measure it with coconut reward compare "
            f"runs={folder} answers=FILE"
        )
    evaluations = read_results(folder)
    test = _test_result(evaluations, {row["sha256"] for row in description["data"].values()})
    answers, answers_of = _read_answers(folder, test, evaluations[test].get("seen") if test else None)
    studies = {file.stem: Study(file.stem, **read_json(file)) for file in sorted((folder / FOLDER).glob("*.json"))}
    train, valid = ([row for row in metrics if row["kind"] == kind] for kind in ("train", "valid"))
    return RunRecord(folder, config, description, train, valid, evaluations, test, answers, answers_of, studies)


def _test_result(evaluations: dict[str, dict[str, Any]], seen: set[str]) -> str | None:
    """The name of the test result: `test`, or else another evaluation with default settings on unseen questions.

    The sets of a suite are other data than the run's, and none of them is its test result.
    """

    def is_test_result(found: dict[str, Any]) -> bool:
        other_file = found["split"] == "test" and found["sha256"] not in seen
        return other_file and found["default_settings"] and "set" not in found and not all_seen(found)

    names = [name for name, found in evaluations.items() if is_test_result(found)]
    return "test" if "test" in names else min(names, default=None)


def _read_answers(folder: Path, test: str | None, seen: dict[str, int] | None) -> tuple[list[dict[str, Any]], str]:
    predictions = folder / "evaluation" / f"{test}.predictions.jsonl"
    if test and predictions.is_file():
        rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").split("\n") if line]
        return rows, f"Of the {describe_questions(len(rows), seen)}, in the order of the file."
    samples = sorted((folder / "samples").glob("step-*.json"))
    if not samples:
        return [], ""
    step = int(samples[-1].stem.removeprefix("step-"))
    return read_json(samples[-1]), f"The first questions of the validation data, as answered after update {step:,}."
