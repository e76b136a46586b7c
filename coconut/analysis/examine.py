"""Measure a trained run: all studies that apply to it, on the questions of its test file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coconut.analysis import interventions, noise, prefix_values, probes
from coconut.analysis.config import AnalyzeConfig, Part
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
from coconut.runs.loading import LoadedRun, classifier_of, load_run
from coconut.runs.record import RunRecord
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS
from coconut.utils.console import log, progress_bar
from coconut.utils.files import sha256

FREE_OF_THOUGHTS = (Part.audit_edges, Part.shortcuts)  # they change questions and read answers
NUM_DECODED = 20  # questions whose thoughts are decoded; the page shows one of them


def examine(config: AnalyzeConfig, record: RunRecord) -> dict[str, Study]:
    """Carry out the studies of a run. Gives all its studies, by name.

    With config.parts, earlier studies of the same update and questions are kept, and a part that does not apply to
    the run raises ValueError. Without, parts that do not apply are left out with a message. Raises ValueError for a
    run of coconut rl, too.
    """
    if "method" not in record.config:
        raise ValueError(
            f"{config.run} was trained by coconut rl, and parts are measured on runs of coconut train. Leave parts "
            "out: its page then has what there is of a policy."
        )
    try:
        path = file_of_split(record.config["data"], "test", config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} parts=[] writes the page only.") from None
    trained = load_run(config.run, config.checkpoint, config.engine)
    examples = read_examples(path)[: config.limit]
    fitting = indices_that_fit(trained.lm, [example.question for example in examples], probes.EXTRA_THOUGHTS)
    training = plan(record.config["method"], Curriculum.from_dict(record.config["curriculum"]))
    task = TASKS[record.config["data"]["task"]]
    subject = probes.Subject(
        trained.lm,
        task,
        [examples[i] for i in fitting],
        config.batch_size,
        training.trained_with_fewer_thoughts,
        training.mixing_probability > 0,
    )
    log(f"Analyzing update {trained.step:,} with {len(fitting):,} questions of {path}")
    if left_out := len(examples) - len(fitting):
        log(f"Left out {left_out:,} questions without room for {probes.EXTRA_THOUGHTS} more thoughts.")

    facts = {"step": trained.step, "file": str(path), "sha256": sha256(path), "questions": len(fitting)}
    earlier = record.studies if config.parts else {}
    studies = {name: study for name, study in earlier.items() if study.facts == study.facts | facts}
    new_studies = _measure_parts(subject, trained, config)
    if studies or new_studies:
        new_studies.append(probes.asked_questions(subject))
    return studies | {study.name: _number_as_in_file(study, fitting, facts) for study in new_studies}


def _measure_parts(subject: probes.Subject, trained: LoadedRun, config: AnalyzeConfig) -> list[Study]:
    """Carry out the studies of the parts, in order."""

    def stopping() -> list[Study]:
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

    measure: dict[Part, Callable[[], list[Study]]] = {
        Part.k_forcing: lambda: [probes.k_forcing(subject)],
        Part.noise: lambda: [noise.noise_curves(subject)],
        Part.prefix_values: lambda: [prefix_values.prefix_values(subject)],
        Part.values: lambda: probes.next_step_values(subject),
        Part.inner_products: lambda: [probes.inner_products(subject)],
        Part.decoded: lambda: [probes.decoded(subject, count=NUM_DECODED)],
        Part.geometry: lambda: geometry(subject),
        Part.rollouts: lambda: [rollouts(subject)],
        Part.readout: lambda: readout(subject, training_examples()),
        Part.audit_thoughts: lambda: [interventions.audit_thoughts(subject)],
        Part.influence: lambda: [influence(subject)],
        Part.audit_edges: lambda: [interventions.audit_edges(subject)],
        Part.shortcuts: lambda: [shortcuts(subject, trained.config["data"], config.data)],
        Part.stopping: stopping,
    }
    studies: list[Study] = []
    parts = config.parts or list(Part)
    with progress_bar("parts", len(parts)) as bar, autocast(trained.lm.device, config.engine.precision):
        for done, part in enumerate(parts):
            bar(done, part.value)
            try:
                if subject.lm.reasoning.slot.merges and part not in FREE_OF_THOUGHTS:
                    raise NotApplicable(
                        f"{subject.lm.reasoning.method} ends its thoughts itself, and this part compares questions "
                        "with equally many."
                    )
                studies += measure[part]()
            except NotApplicable as reason:
                if config.parts:
                    raise
                log(f"Left out {part.value}: {reason}")
    return studies


def _number_as_in_file(study: Study, row_of: list[int], facts: dict[str, Any]) -> Study:
    """Add facts that all studies share, and replace question indices by the indices of rows in the data file."""
    rows = [row | {"question": row_of[row["question"]]} if "question" in row else row for row in study.rows]
    return Study(study.name, rows, study.facts | facts)
