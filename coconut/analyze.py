"""Look into a trained run and write one page about it; after the word `table`, compare several runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.analysis.comparable_runs import folders
from coconut.analysis.config import AnalyzeConfig, Part, TableConfig
from coconut.data.seen_questions import describe_questions
from coconut.engine.launcher_env import read_launcher_env
from coconut.methods import Curriculum, plan
from coconut.reporting import run_table as table
from coconut.reporting.charts import save_png
from coconut.reporting.page import percent
from coconut.reporting.run_page import answers, headline, learning, provenance, report
from coconut.reporting.sections import WIDE, are_they_used, drawings, how_many, what_they_hold
from coconut.rl import report as policies
from coconut.rl.report import on_screen
from coconut.runs.record import RunRecord, read_run
from coconut.runs.study import FOLDER, NotApplicable, Study
from coconut.utils.console import log, progress_bar, silence_libraries
from coconut.utils.files import atomic_folder, write_text
from coconut.utils.hydra_app import application, subcommands

if TYPE_CHECKING:
    from coconut.analysis.probes import Subject
    from coconut.runs.loading import LoadedRun

DECODED = 20  # questions, among which the page finds a telling one
ASKED = ("train", "test")  # splits that a router learns from, and is compared on
FITTED_ON = 1000  # training questions, at most, from which a router learns
SECTIONS = (headline, policies.choices, how_many, what_they_hold, are_they_used, learning, answers, provenance)


def run(config: AnalyzeConfig) -> int:
    """Examine a run's model, if it has come so far, and write its page."""
    if read_launcher_env().rank:
        return 0  # of several processes one is enough
    silence_libraries()
    record = read_run(config.run)
    path = Path(config.output) if config.output else record.folder / "report.html"
    if config.parts is None and policies.chooses(record):
        examine_choices(config, record)
    elif config.parts or (config.parts is None and not policies.is_policy(record) and record.best):
        examine(config, record)
    record = read_run(config.run)
    write_text(path, policies.report(record) if policies.is_policy(record) else report(record, SECTIONS))
    if record.test:
        found = record.evaluations[record.test]
        log(f"accuracy {percent(found['accuracy'])} on {describe_questions(found['count'], found.get('seen'))}")
    log(f"Report: {path}")
    return 0


def examine(config: AnalyzeConfig, record: RunRecord) -> None:
    """Carry out the studies of a run, and keep their data and pictures in RUN/analysis.

    Parts asked for by name join what was measured before on the same update and questions.

    Raises ValueError if a part that was asked for by name does not fit the run; others are left out, and said so.
    """
    from coconut.analysis.probes import MORE, Subject, asked
    from coconut.data.datasets import file_of_split
    from coconut.data.examples import read_examples
    from coconut.engine.base import autocast
    from coconut.generation.room import indices_that_fit
    from coconut.runs.loading import load_run
    from coconut.tasks import TASKS
    from coconut.utils.files import sha256

    try:
        path = file_of_split(record.config["data"], "test", config.data.test)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} parts=[] writes the page alone.") from None
    trained = load_run(config.run, config.checkpoint, config.engine)
    examples = read_examples(path)[: config.limit]
    kept = indices_that_fit(trained.lm, [example.question for example in examples], MORE)
    subject = Subject(
        trained.lm,
        TASKS[record.config["data"]["task"]],
        [examples[i] for i in kept],
        batch_size=config.batch_size,
        trained_with_fewer_thoughts=plan(
            record.config["method"], Curriculum.from_dict(record.config["curriculum"])
        ).trained_with_fewer_thoughts,
    )
    about = {"step": trained.step, "file": str(path), "sha256": sha256(path), "questions": len(kept)}
    wanted = config.parts or list(Part)
    log(f"Looking into update {trained.step:,} with {len(kept):,} questions of {path}")
    if len(kept) < len(examples):
        log(f"Left out {len(examples) - len(kept):,} questions that leave no room for {MORE} thoughts more.")
    studies = {
        name: study for name, study in record.studies.items() if config.parts and study.facts == study.facts | about
    }
    with progress_bar("parts", len(wanted)) as bar, autocast(trained.lm.device, config.engine.precision):
        for done, part in enumerate(wanted):
            bar(done, part.value)
            try:
                made = _carry_out(part, subject, trained, config)
            except NotApplicable as reason:
                if config.parts:
                    raise
                log(f"Left out {part.value}: {reason}")
                continue
            studies |= {study.name: _as_in_file(study, kept, about) for study in made}
    if studies:
        studies["asked"] = _as_in_file(asked(subject), kept, about)
    with atomic_folder(record.folder / FOLDER) as folder:
        for study in studies.values():
            study.write(folder)
        for name, draw in drawings(replace(record, studies=studies)).items():
            save_png(draw(WIDE), folder / f"{name}.png")
    log(f"Data and pictures: {record.folder / FOLDER}")


def examine_choices(config: AnalyzeConfig, record: RunRecord) -> None:
    """How a hybrid model chooses, on its test questions, and who would choose better: into RUN/analysis."""
    from coconut.data.datasets import file_of_split
    from coconut.data.examples import read_examples
    from coconut.data.seen_questions import seen_by
    from coconut.engine.base import autocast
    from coconut.generation.room import indices_that_fit
    from coconut.rl.mode_routing import choice_studies
    from coconut.runs.loading import load_run
    from coconut.tasks import TASKS
    from coconut.utils.files import sha256

    try:
        files = {split: file_of_split(record.config["data"], split, getattr(config.data, split)) for split in ASKED}
    except FileNotFoundError as error:
        log(f"Its choices are not compared. {error}")
        return
    trained = load_run(config.run, config.checkpoint, config.engine)
    asked, others = read_examples(files["test"])[: config.limit], read_examples(files["train"])[:FITTED_ON]
    asked, others = (
        [part[i] for i in indices_that_fit(trained.lm, [e.question for e in part])] for part in (asked, others)
    )
    log(f"Looking into {trained.step:,}: {len(asked):,} questions of {files['test']}, in every mode")
    with autocast(trained.lm.device, config.engine.precision):
        studies = choice_studies(
            trained.lm, TASKS[record.config["data"]["task"]], asked, others, batch_size=config.batch_size
        )
    about = {
        "step": trained.step, "file": files["test"], "sha256": sha256(files["test"]), "questions": len(asked),
        "seen": seen_by(config.run, [example.question for example in asked]),
    }  # fmt: skip
    with atomic_folder(record.folder / FOLDER) as folder:
        for study in studies:
            replace(study, facts=study.facts | about).write(folder)
    log(on_screen(studies[0]))


def _as_in_file(study: Study, kept: list[int], facts: dict[str, Any]) -> Study:
    """With the facts that all studies share, and questions numbered as in their file."""
    rows = [row | {"question": kept[row["question"]]} if "question" in row else row for row in study.rows]
    return Study(study.name, rows, study.facts | facts)


def _carry_out(part: Part, subject: Subject, trained: LoadedRun, config: AnalyzeConfig) -> list[Study]:
    from coconut.analysis import interventions as audit
    from coconut.analysis import prefix_values as prefix
    from coconut.analysis import probes
    from coconut.runs.loading import classifier_of

    def stopping() -> list[Study]:
        try:
            classifier = classifier_of(config.run, trained, config.batch_size, config.data)
        except ValueError as reason:
            raise NotApplicable(str(reason)) from None
        return [probes.stopping(subject, classifier)]

    make: dict[Part, Callable[[], list[Study]]] = {
        Part.k_forcing: lambda: [probes.k_forcing(subject)],
        Part.prefix_values: lambda: [prefix.prefix_values(subject)],
        Part.values: lambda: probes.next_step_values(subject),
        Part.inner_products: lambda: [probes.inner_products(subject)],
        Part.decoded: lambda: [probes.decoded(subject, count=DECODED)],
        Part.audit_thoughts: lambda: [audit.audit_thoughts(subject)],
        Part.audit_edges: lambda: [audit.audit_edges(subject)],
        Part.stopping: stopping,
    }
    return make[part]()


def several(config: TableConfig) -> int:
    """The table of trained methods, or of policies."""
    named = folders(config.runs)
    records = [read_run(folder) for folder in named]
    kinds = [policies.is_policy(record) for record in records]
    if not any(kinds):
        return table.run(config)
    if not all(kinds):
        both = records[kinds.index(True)].folder, records[kinds.index(False)].folder
        raise ValueError(f"{both[0]} was trained by reward and {both[1]} was not: make a table of each kind.")
    study = policies.comparison(records)
    folder = table.place_of(config, table.common_folder(named))
    study.write(folder)
    write_text(folder / "policies.html", policies.comparison_page(study, records, folder))
    log("\n".join(table.aligned([policies.columns(study.facts["modes"]), *policies.table_rows(study)])))
    log(f"Table: {folder / 'policies.html'}, and beside it .csv, .json")
    return 0


main = subcommands(application("analyze", AnalyzeConfig, run), table=application("run_table", TableConfig, several))


if __name__ == "__main__":
    main()
