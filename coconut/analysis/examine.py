"""Measure a trained run: all studies that apply to it, on the questions of its test file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coconut.analysis import interventions, noise, prefix_values, probes
from coconut.analysis.config import AnalyzeConfig, Part
from coconut.analysis.fixed_thoughts import FixedThoughts, with_fixed_thoughts
from coconut.analysis.geometry import geometry
from coconut.analysis.influence import influence
from coconut.analysis.readout import readout
from coconut.analysis.rollouts import rollouts
from coconut.analysis.shortcuts import shortcuts
from coconut.data.datasets import file_of_split
from coconut.data.examples import Example, read_examples
from coconut.engine.base import autocast
from coconut.generation.room import indices_that_fit
from coconut.methods import Curriculum, plan
from coconut.runs.loading import LoadedRun, classifier_of, load_run, supervised_config
from coconut.runs.record import RunRecord
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS
from coconut.utils.console import log, progress_bar
from coconut.utils.files import sha256

AS_IT_DECIDES = (Part.shortcuts,)  # asks questions, and leaves to the model whether it thinks and how long
NUM_DECODED = 20  # questions whose thoughts are decoded; the page shows one of them


def examine(config: AnalyzeConfig, record: RunRecord) -> dict[str, Study]:
    """Carry out the studies of a run. Gives all its studies, by name.

    With config.parts, earlier studies of the same update and questions are kept, and a part that does not apply to
    the run raises ValueError. Without, parts that do not apply are left out with a message.
    """
    try:
        path = file_of_split(record.config["data"], "test", config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} parts=[] writes the page only.") from None
    trained = load_run(config.run, config.checkpoint, config.engine)
    examples = read_examples(path)[: config.limit]
    fitting = indices_that_fit(trained.lm, [example.question for example in examples], probes.EXTRA_THOUGHTS)
    supervised = supervised_config(config.run)
    training = plan(supervised["method"], Curriculum.from_dict(supervised["curriculum"])) if supervised else None
    task = TASKS[record.config["data"]["task"]]
    subject = probes.Subject(
        trained.lm,
        task,
        [examples[i] for i in fitting],
        config.batch_size,
        trained_with_fewer_thoughts=training is not None and training.trained_with_fewer_thoughts,
        mixed=training is not None and training.mixing_probability > 0,
    )
    log(f"Analyzing {record.unit} {trained.step:,} with {len(fitting):,} questions of {path}")
    if left_out := len(examples) - len(fitting):
        log(f"Left out {left_out:,} questions without room for {probes.EXTRA_THOUGHTS} more thoughts.")

    facts = {"step": trained.step, "file": str(path), "sha256": sha256(path), "questions": len(fitting)}
    earlier = record.studies if config.parts else {}
    studies = {name: study for name, study in earlier.items() if study.facts == study.facts | facts}
    new_studies = _measure_parts(subject, trained, config)
    if studies or new_studies:
        new_studies.append(probes.asked_questions(subject))
    return studies | {study.name: _number_as_in_file(study, fitting, facts) for study in new_studies}


def _measure_parts(asked: probes.Subject, trained: LoadedRun, config: AnalyzeConfig) -> list[Study]:
    """Carry out the studies of the parts, in order. All but AS_IT_DECIDES are with a fixed number of thoughts."""

    def stopping(subject: probes.Subject) -> list[Study]:
        try:
            classifier = classifier_of(config.run, trained, config.batch_size, config.data)
        except ValueError as reason:
            raise NotApplicable(str(reason)) from None
        return [probes.stopping(subject, classifier)]

    def training_examples() -> list[Example] | None:
        try:
            path = file_of_split(trained.config["data"], "train", config.data)
        except FileNotFoundError as reason:
            log(f"The probes are fitted on one half of the test questions and measured on the other. {reason}")
            return None
        return read_examples(path)

    measure: dict[Part, Callable[[probes.Subject], list[Study]]] = {
        Part.k_forcing: lambda subject: [probes.k_forcing(subject)],
        Part.noise: lambda subject: [noise.noise_curves(subject)],
        Part.prefix_values: lambda subject: [prefix_values.prefix_values(subject)],
        Part.values: probes.next_step_values,
        Part.inner_products: lambda subject: [probes.inner_products(subject)],
        Part.decoded: lambda subject: [probes.decoded(subject, count=NUM_DECODED)],
        Part.geometry: geometry,
        Part.rollouts: lambda subject: [rollouts(subject)],
        Part.readout: lambda subject: readout(subject, training_examples()),
        Part.audit_thoughts: lambda subject: [interventions.audit_thoughts(subject)],
        Part.influence: lambda subject: [influence(subject)],
        Part.audit_edges: lambda subject: [interventions.audit_edges(subject)],
        Part.shortcuts: lambda subject: [shortcuts(subject, trained.config["data"], config.data)],
        Part.stopping: stopping,
    }
    studies: list[Study] = []
    parts = config.parts or list(Part)
    fixed: FixedThoughts | NotApplicable | None = None
    with progress_bar("parts", len(parts)) as bar, autocast(trained.lm.device, config.engine.precision):
        for done, part in enumerate(parts):
            bar(done, part.value)
            try:
                if part in AS_IT_DECIDES:
                    studies += measure[part](asked)
                    continue
                fixed = fixed or _fixed(asked)
                if isinstance(fixed, NotApplicable):
                    raise fixed
                studies += [
                    _number_as_in_file(study, fixed.chosen, fixed.facts) for study in measure[part](fixed.subject)
                ]
            except NotApplicable as reason:
                if config.parts:
                    raise
                log(f"Left out {part.value}: {reason}")
    return studies


def _fixed(subject: probes.Subject) -> FixedThoughts | NotApplicable:
    """`with_fixed_thoughts`, or why there is none."""
    try:
        fixed = with_fixed_thoughts(subject)
    except NotApplicable as reason:
        return reason
    if alike := fixed.facts.get("alike"):
        log(
            "The model ends its thoughts itself. Parts that compare thoughts are measured with {thoughts} of them, on "
            "the {questions:,} of {of:,} questions for which it takes so many.".format(**alike)
        )
    if mode := fixed.facts.get("mode"):
        log(f"The model chooses how to answer. Parts that compare thoughts are measured in the mode {mode}.")
    return fixed


def _number_as_in_file(study: Study, row_of: list[int], facts: dict[str, Any]) -> Study:
    """Add facts that several studies share, and replace each index of a question, i, by `row_of[i]`."""
    rows = [row | {"question": row_of[row["question"]]} if "question" in row else row for row in study.rows]
    return Study(study.name, rows, study.facts | facts)
